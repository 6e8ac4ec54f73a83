"""Quality against evaluations: what solvers, time grids and cheaper guidance make of a model of the story world.

    .venv/bin/python -m benchmarks.quality [--model DIR] [--stories N] [--figure FILE.svg] [--threads N]

One JSON line a setting: the DiT's evaluations a block (a guided one counts two), seconds, the story world's measures.
All settings continue the same held-out stories from the same noise.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opencola.checkpoints import official
from opencola.checkpoints.hub import SHIPPED
from opencola.checkpoints.settings import load_sampling
from opencola.evaluation.writing import continuation_shares, held_out, last_word_scores, write_stories
from opencola.models.cola.model import Cola
from opencola.models.cola.sampling import ColaSampling
from opencola.text.lines import dump
from opencola.text.tokenizer import Tokenizer

SEED = -888  # neither the training's stories nor those of the demo's results


def settings() -> Iterator[tuple[str, ColaSampling]]:
    """(name, settings) of every point."""
    for steps in (2, 4, 8, 16, 32):
        yield "euler", ColaSampling(steps=steps)
    for steps in (2, 4, 8):
        yield "heun", ColaSampling(steps=steps, solver="heun")
        yield "midpoint", ColaSampling(steps=steps, solver="midpoint")
    for steps in (4, 8, 16):
        yield "stochastic", ColaSampling(steps=steps, solver="stochastic")
    for steps in (4, 8):
        yield "euler, shift 2", ColaSampling(steps=steps, shift=2.0)
        yield "euler, shift 0.5", ColaSampling(steps=steps, shift=0.5)
    for solver in ("euler", "stochastic"):
        yield f"{solver}, guided for t >= 0.5", ColaSampling(steps=8, solver=solver, guidance_until=0.5)
        yield f"{solver}, guidance every 2nd", ColaSampling(steps=8, solver=solver, guidance_every=2)
        yield f"{solver}, guidance 1", ColaSampling(steps=8, solver=solver, guidance=1.0)


def evaluations(model: Cola, sampling: ColaSampling) -> int:
    """Passes of one sample through the DiT for one block; a guided evaluation makes two."""
    size = model.dit.config.block_size
    passes: list[int] = []
    hook = model.dit.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    prompt = list(range(2 * size * model.vae.config.patch_size))
    next(model.generate([prompt], replace(sampling, max_new_tokens=1)))
    hook.remove()
    return sum(passes) - 1  # the first is the prompt's


def draw(lines: list[dict[str, Any]], file: Path) -> None:
    """Legal sentences and consistent stories over evaluations, a curve for each name."""
    from matplotlib.figure import Figure  # half a second that only this needs
    from matplotlib.markers import MarkerStyle

    figure = Figure(figsize=(10, 4), layout="constrained")
    for panel, measure in zip(figure.subplots(1, 2), ("legal_sentences", "consistent_stories"), strict=True):
        for number, name in enumerate(dict.fromkeys(line["name"] for line in lines)):
            there = sorted((line["evaluations"], line[measure]) for line in lines if line["name"] == name)
            marker = MarkerStyle.filled_markers[number % len(MarkerStyle.filled_markers)]
            panel.semilogx(*zip(*there, strict=True), f"{marker}-", base=2, label=name)
        panel.set_xlabel("DiT passes a block")
        panel.set_title(measure.replace("_", " "))
    panel.legend(fontsize="x-small", loc="lower right")
    figure.savefig(file)


def main() -> None:
    """Measure every setting."""
    parser = argparse.ArgumentParser(description="Quality against evaluations.")
    parser.add_argument("--model", type=Path, default=SHIPPED, help="folder of a model of the story world")
    parser.add_argument("--stories", type=int, default=200, help="held-out stories")
    parser.add_argument("--figure", type=Path, help="file to draw into")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = official.load(options.model).eval(), Tokenizer.load(options.model)
    guidance = load_sampling(options.model).guidance
    stories, lines = held_out(options.stories, SEED), []
    for name, sampling in settings():
        if sampling.guidance != 1:
            sampling = replace(sampling, guidance=guidance)
        start = time.perf_counter()
        continuations, last_words, _ = write_stories(model, tokenizer, sampling, stories, display=False)
        line: dict[str, Any] = {"name": name, "steps": sampling.steps, "evaluations": evaluations(model, sampling)}
        line["seconds"] = round(time.perf_counter() - start, 1)
        shares = continuation_shares(continuations) | {"last_words": last_word_scores(last_words)[0]}
        for measure in ("legal_sentences", "consistent_stories", "last_words"):
            share = shares[measure]
            line |= {measure: round(share.value, 4), f"{measure}_interval": [round(share.low, 3), round(share.high, 3)]}
        lines.append(line | {"stories": options.stories, "guidance": sampling.guidance, "threads": options.threads})
        print(dump(lines[-1]), flush=True)
    if options.figure:
        draw(lines, options.figure)


if __name__ == "__main__":
    main()
