"""How time grows: generation with the prompt's length and the batch, a training step with the sequence's length.

    .venv/bin/python -m benchmarks.growth [--figure FILE.svg] [--threads N]

Size S. Generation: 32 new tokens, 16 Euler steps, guidance 7. Training: forward and backward of the packed prior, one
noisy copy, 2 048 latents in all. One JSON line a point; the figure shows them with the floor (useful operations at the
GEMM rate of the same run).
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import SIZES, generation_flops, training_flops, training_step
from benchmarks.floor import best_seconds, probe
from opencola.models.cola.model import Cola
from opencola.models.cola.sampling import ColaSampling
from opencola.text.lines import dump

NEW = 32
PROMPTS = (64, 256, 1024, 4096)
BATCHES = (1, 4, 16, 64)
LENGTHS = (128, 256, 512, 1024, 2048)
TRAINED = 2048


def points(cola: Cola) -> list[tuple[str, int, int, int, Callable[[], object]]]:
    """(what grows, how far, tokens, useful operations, what to time) of every point."""
    sampling = ColaSampling(max_new_tokens=NEW, steps=16)
    all_points: list[tuple[str, int, int, int, Callable[[], object]]] = []
    for axis, batch, prompt in [*(("prompt", 1, p) for p in PROMPTS), *(("batch", b, 64) for b in BATCHES)]:
        texts = torch.randint(0, cola.vae.config.vocab_size, (batch, prompt)).tolist()
        flops = generation_flops(cola, batch, prompt, NEW, sampling.steps)
        size = prompt if axis == "prompt" else batch
        all_points.append((axis, size, batch * NEW, flops, lambda texts=texts: list(cola.generate(texts, sampling))))  # type: ignore[misc]
    for length in LENGTHS:
        batch = TRAINED // length
        step = training_step(cola, batch, length)
        all_points.append(("length", length, TRAINED, training_flops(cola, batch, length), step))
    return all_points


def draw(lines: list[dict[str, Any]], file: Path) -> None:
    """Microseconds per token and their floor, a panel for each thing that grows."""
    from matplotlib.figure import Figure  # half a second that only this needs

    titles = {"prompt": "prompt, tokens", "batch": "batch, samples", "length": "training sequence, latents"}
    figure = Figure(figsize=(10, 3), layout="constrained")
    for panel, (axis, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        there = [line for line in lines if line["axis"] == axis]
        for key, label, style in (("us_per_token", "µs per token", "o-"), ("floor_us_per_token", "floor", "--")):
            panel.loglog([line["size"] for line in there], [line[key] for line in there], style, label=label)
        panel.set_xlabel(title)
        panel.set_xticks([line["size"] for line in there], [str(line["size"]) for line in there])
        panel.minorticks_off()
        panel.set_ylim(500, 200_000)
    panel.legend()
    figure.savefig(file)


def main() -> None:
    """Time every point."""
    parser = argparse.ArgumentParser(description="Growth of time with size.")
    parser.add_argument("--figure", type=Path, help="file to draw into")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    lines: list[dict[str, Any]] = []
    for axis, size, tokens, flops, run in points(Cola(SIZES["S"]).eval()):
        run()
        floor, best = probe(), best_seconds(run, 2)
        floor = floor.best(probe())
        line: dict[str, Any] = {"axis": axis, "size": size, "us_per_token": round(1e6 * best / tokens, 1)}
        line["floor_us_per_token"] = round(1e6 * floor.seconds(flops) / tokens, 1)
        line["floor_ratio"] = round(floor.ratio(best, flops), 2)
        lines.append(line | {"gemm_gflops": round(floor.gflops, 1), "threads": options.threads})
        print(dump(lines[-1]), flush=True)
    if options.figure:
        draw(lines, options.figure)


if __name__ == "__main__":
    main()
