"""The end of the demo: measure a trained model on held-out stories, show what it writes, and leave a report."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from opencola.checkpoints import card, official
from opencola.checkpoints.settings import load_sampling
from opencola.errors import UserError
from opencola.evaluation import screen
from opencola.evaluation.latents.reconstruction import Reconstruction
from opencola.evaluation.latents.traces import map_variables, reconstruct_stories, trace_blocks
from opencola.evaluation.reporting.demo_page import DemoPage, Measure, read_stages, render
from opencola.evaluation.screen import table
from opencola.evaluation.statistics import share
from opencola.evaluation.writing import (
    BATCH_SIZE,
    HELD_OUT_SEED,
    PROMPT_SENTENCES,
    Continuation,
    LastWord,
    continuation_shares,
    held_out,
    last_word_scores,
    mean_log_probability,
    write_records,
    write_stories,
)
from opencola.storage import locked, replacing
from opencola.text.tokenizer import Tokenizer

SAMPLES_SHOWN = 8
HEADLINES = ("legal_sentences", "consistent_stories", "last_word_accuracy", "reconstruction_accuracy", "vae_logsnr")
MEANING = {
    "legal_sentences": "written sentences that the world has",
    "consistent_stories": "whole stories that the world could tell",
    "last_word_accuracy": "stories given their right last word",
    "last_word_ceiling": "best possible: the likeliest word's mean chance",
    "last_word_of_determined": "accuracy over this ceiling",
    "reconstruction_accuracy": "tokens that their latents give back",
    "reconstruction_accuracy_of_mean": "the same from the posterior's mean, not a sample",
    "vae_logsnr": "log of the latents' signal over noise",
    "order_legal": "stories whose sentences come in a right order",
    "complete": "stories that begin, end, and miss nothing between",
    "conflict_free": "stories in which no sentence contradicts another",
    "distinct_continuations": "continuations unlike all others",
    "original_continuations": "continuations equal to the held-out story's own",
}


def finish(out: Path, num_stories: int = 200, display: bool = True, started: float | None = None) -> dict[str, Any]:
    """Measure the model in `out` on held-out stories; write metrics.json, evaluation.jsonl and report.html there.

    The model's card is written anew with the results.

    out: an exported model with its tokenizer, the training stages' folders in it; display: show progress, samples and
    results; started: `time.time()` at the start of everything that `seconds` shall count (by default the stages'
    training and this evaluation). Returns what metrics.json holds. Raises FileNotFoundError or UserError when `out`
    holds no such model, and UserError where another process writes there.
    """
    if num_stories < 1:
        raise UserError(f"num_stories must be at least 1, but is {num_stories}")
    with locked(out):
        return _finish(out, num_stories, display, started)


def _finish(out: Path, num_stories: int, display: bool, started: float | None) -> dict[str, Any]:
    begin = time.time()
    model, tokenizer, sampling = official.load(out).eval(), Tokenizer.load(out), load_sampling(out)
    stages = read_stages(out)
    stories = held_out(num_stories)
    continuations, last_words, budget = write_stories(model, tokenizer, sampling, stories, display)
    reconstruction = reconstruct_stories(model, tokenizer, stories, sampling.seed)
    measures = _measures(continuations, last_words, reconstruction)
    chosen = next((i for i, record in enumerate(continuations) if record.consistent), 0)
    trace = trace_blocks(model, tokenizer, sampling, continuations[chosen].prompt, chosen)
    maps = map_variables(model, tokenizer)
    training = sum(records[-1]["seconds"] for records in stages.values())
    settings = {
        "sampling": asdict(sampling),
        "evaluation": {
            "num_stories": num_stories,
            "held_out_seed": HELD_OUT_SEED,
            "prompt_sentences": PROMPT_SENTENCES,
            "max_new_tokens": budget,
            "batch_size": BATCH_SIZE,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        "vae": asdict(model.vae.config),
        "dit": asdict(model.dit.config),
    }
    num_parameters = sum(p.numel() for p in model.parameters())
    subtitle = (
        f"A Cola DLM of {num_parameters / 1e6:.2f} M parameters, trained for {training / 60:.1f} minutes on generated "
        f"stories and measured on {num_stories} held-out ones."
    )
    samples = continuations[:SAMPLES_SHOWN]
    page = DemoPage("OpenCola: story world", subtitle, measures, HEADLINES, stages, samples, maps, trace, settings)
    now = time.time()
    metrics: dict[str, Any] = {
        "seconds": training + now - begin if started is None else now - started,
        "training_seconds": training,
        "evaluation_seconds": now - begin,
        **{measure.name: measure.value for measure in measures},
        "mean_log_probability": mean_log_probability(continuations),
        "intervals": {measure.name: list(measure.interval) for measure in measures if measure.interval is not None},
        "counts": {measure.name: measure.count for measure in measures},
        "settings": settings,
    }
    with replacing(out) as draft:
        write_records(draft / "evaluation.jsonl", continuations, last_words)
        (draft / "report.html").write_text(render(page), encoding="utf-8")
        (draft / card.EVALUATION).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    card.write(out)
    if display:
        _show(samples, measures, out, metrics["seconds"])
    return metrics


def _measures(
    continuations: Sequence[Continuation], last_words: Sequence[LastWord], reconstruction: Reconstruction
) -> list[Measure]:
    """All results, in the order of their meanings."""
    accuracy, ceiling, of_determined = last_word_scores(last_words)
    shares = continuation_shares(continuations) | {
        "last_word_accuracy": accuracy,
        "reconstruction_accuracy": share(reconstruction.from_sample, reconstruction.count),
        "reconstruction_accuracy_of_mean": share(reconstruction.from_mean, reconstruction.count),
    }
    by_name = {
        name: Measure(name, s.value, True, (s.low, s.high), s.count, MEANING[name]) for name, s in shares.items()
    }
    for name, value in (("last_word_ceiling", ceiling), ("last_word_of_determined", of_determined)):
        by_name[name] = Measure(name, value, True, None, len(last_words), MEANING[name])
    by_name["vae_logsnr"] = Measure(
        "vae_logsnr", reconstruction.logsnr, False, None, reconstruction.count, MEANING["vae_logsnr"]
    )
    return [by_name[name] for name in MEANING]


def _show(samples: Sequence[Continuation], measures: Sequence[Measure], out: Path, seconds: float) -> None:
    """Samples and results on the terminal."""
    console = screen.console()
    console.print()
    for sample in samples:
        mark = f"[red]✗ {escape(sample.fault)}[/]" if sample.fault else "[green]✓[/]"
        console.print(f"[dim]{escape(sample.prompt)}[/][bold]{escape(sample.continuation)}[/] {mark}\n")
    grid = table("", "value", "95 % interval", "what it says", words=(0, 3))
    for measure in measures:
        if measure.name in HEADLINES:
            grid.add_row(measure.label, f"[bold]{measure.text}[/]", measure.interval_text, measure.meaning)
    screen.put(grid)
    console.print(f"\n{seconds / 60:.1f} minutes in all. Report: {out / 'report.html'}")
