"""The end of the demo: measure a trained model on held-out stories, show what it writes, and leave a report."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from opencola.evaluation.latents import LatentMap, Reconstruction, pack_documents, principal_plane, reconstruct
from opencola.evaluation.report import Measure, Report, Trace, render
from opencola.evaluation.stories import (
    HELD_OUT_SEED,
    PROMPT_SENTENCES,
    Continuation,
    LastWord,
    Writer,
    continuation_shares,
    continue_stories,
    held_out,
    last_word_scores,
    mean_log_probability,
    predict_last_words,
    share,
    token_budgets,
    write_records,
)
from opencola.interop import card, official
from opencola.models.cola import Cola
from opencola.models.language_model import LanguageModel
from opencola.models.sampling import Sampling
from opencola.models.text_stream import generate_text
from opencola.text.stories import Story
from opencola.text.tokenizer import Tokenizer

BATCH_SIZE = 50
SAMPLES_SHOWN = 8
BLOCKS_SHOWN = 8
MAP_STORIES = 300
MAPPED = ("animal", "place")
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
    training and this evaluation). Returns what metrics.json holds. Raises FileNotFoundError or ValueError when `out`
    holds no such model.
    """
    if num_stories < 1:
        raise ValueError(f"num_stories must be at least 1, but is {num_stories}")
    begin = time.time()
    model, tokenizer, sampling = official.load(out).eval(), Tokenizer.load(out), official.load_sampling(out)
    stages = read_stages(out)
    stories = held_out(num_stories)
    continuations, last_words, budget = write_stories(model, tokenizer, sampling, stories, display)
    reconstruction = reconstruct_stories(model, tokenizer, stories, sampling.seed)
    measures = _measures(continuations, last_words, reconstruction)
    chosen = next((i for i, record in enumerate(continuations) if record.consistent), 0)
    trace = trace_blocks(model, tokenizer, sampling, continuations[chosen].prompt, chosen)
    maps = map_variables(model, tokenizer)
    write_records(out / "evaluation.jsonl", continuations, last_words)
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
    page = Report("OpenCola: story world", subtitle, measures, HEADLINES, stages, samples, maps, trace, settings)
    (out / "report.html").write_text(render(page), encoding="utf-8")
    now = time.time()
    metrics: dict[str, Any] = {
        "seconds": training + now - begin if started is None else now - started,
        "training_seconds": training,
        "evaluation_seconds": now - begin,
        **{measure.name: measure.value for measure in measures},
        "mean_log_probability": mean_log_probability(continuations),
        "intervals": {one.name: list(one.interval) for one in measures if one.interval is not None},
        "counts": {measure.name: measure.count for measure in measures},
        "settings": settings,
    }
    (out / card.EVALUATION).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    card.write(out)
    if display:
        _show(samples, measures, out, metrics["seconds"])
    return metrics


def write_stories(
    model: LanguageModel, tokenizer: Tokenizer, sampling: Sampling, stories: Sequence[Story], display: bool = True
) -> tuple[list[Continuation], list[LastWord], dict[str, int]]:
    """Have the model continue stories and find their last words; the third result is the token budgets of both."""
    budgets = token_budgets(stories, lambda text: len(tokenizer.encode(text)))
    budget = dict(zip(("continuation", "last_word"), budgets, strict=True))
    with _progress(display) as progress:
        write = _writer(model, tokenizer, sampling, progress, "continuing stories", len(stories))
        continuations = continue_stories(stories, write, budget["continuation"])
        write = _writer(model, tokenizer, sampling, progress, "finding last words", len(stories))
        last_words = predict_last_words(stories, write, budget["last_word"])
    return continuations, last_words, budget


def read_stages(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of every training stage below a run's folder, or in it, in the order in which they ended."""
    found = [*out.glob("metrics.jsonl"), *out.glob("*/metrics.jsonl")]
    files = sorted(found, key=lambda file: (file.stat().st_mtime, file))
    stages = {file.parent.name: [json.loads(line) for line in file.read_text().splitlines()] for file in files}
    return {name: records for name, records in stages.items() if records}


def reconstruct_stories(model: Cola, tokenizer: Tokenizer, stories: Sequence[Story], seed: int) -> Reconstruction:
    """Reconstruction of stories with their end-of-text tokens, in rows as training packs them."""
    vae = model.vae
    tokens = [[*tokenizer.encode(tale.text), tokenizer.eos_id] for tale in stories]
    documents = pack_documents(tokens, vae.config.patch_size * vae.config.visible_block)

    def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
        posterior = vae.encode(rows)
        return posterior.mean, posterior.logvar.exp()

    return reconstruct(documents, encode, vae.decode, seed)


def trace_blocks(model: Cola, tokenizer: Tokenizer, sampling: Sampling, prompt: str, sample_id: int) -> Trace:
    """Write the first blocks after a prompt and note what every state of the flow would decode to."""
    states: list[list[list[str]]] = []
    times: list[float] = []

    def watch(block: int, t: float, tokens: Tensor) -> None:
        if block == len(states):
            states.append([])
        states[block].append([_token_text(tokenizer, token) for token in tokens[0].tolist()])
        if block == 0:
            times.append(t)

    # of several candidates only one would be shown, perhaps not the one that was kept
    settings = replace(sampling, candidates=1)
    ids = tokenizer.encode(prompt)
    blocks = model.generate([ids], settings, eos_ids=[tokenizer.eos_id], ids=[sample_id], watch=watch)
    for _ in zip(range(BLOCKS_SHOWN), blocks, strict=False):
        pass
    return Trace(prompt, times, states, len(ids) % (model.dit.config.block_size * model.vae.config.patch_size))


def map_variables(model: Cola, tokenizer: Tokenizer) -> list[LatentMap]:
    """For each mapped variable, where the latents of the words that tell it first lie in held-out stories."""
    vae = model.vae
    stories = held_out(MAP_STORIES)
    encoded = [tokenizer.encode(tale.text) for tale in stories]
    documents = pack_documents(encoded, vae.config.patch_size * vae.config.visible_block)
    with torch.inference_mode():
        latents = torch.cat([vae.encode(rows).mean for rows in documents.tokens.split(BATCH_SIZE)]).numpy()
    maps = []
    for variable in MAPPED:
        rows, values = [], []
        for tale, tokens, latent in zip(stories, encoded, latents, strict=True):
            value = tale.variables[variable]
            match = re.search(rf"\b{value}\b", tale.text)
            if match is not None:
                last = next(n for n in range(len(tokens)) if len(tokenizer.decode(tokens[: n + 1])) >= match.end())
                rows.append(latent[last // vae.config.patch_size])
                values.append(value)
        maps.append(principal_plane(variable, np.stack(rows), values))
    return maps


def _writer(
    model: LanguageModel, tokenizer: Tokenizer, sampling: Sampling, progress: Progress, task: str, total: int
) -> Writer:
    """The model as a writer of texts; a prompt's place in the list decides its noise, and the bar follows."""
    bar = progress.add_task(task, total=total)

    def write(prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        settings = replace(sampling, max_new_tokens=max_new_tokens)
        texts = [""] * len(prompts)
        for start in range(0, len(prompts), BATCH_SIZE):
            batch = prompts[start : start + BATCH_SIZE]
            ids = range(start, start + len(batch))
            for pieces in generate_text(model, tokenizer, batch, settings, ids):
                for piece in pieces:
                    texts[start + piece.sample] += piece.text
                    progress.advance(bar, bool(piece.finished))
        return texts

    return write


def _progress(display: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=not display)


def _token_text(tokenizer: Tokenizer, token: int) -> str:
    return "⟨end⟩" if token == tokenizer.eos_id else tokenizer.decode([token])


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
    found = {name: Measure(name, s.value, True, (s.low, s.high), s.count, MEANING[name]) for name, s in shares.items()}
    for name, value in (("last_word_ceiling", ceiling), ("last_word_of_determined", of_determined)):
        found[name] = Measure(name, value, True, None, len(last_words), MEANING[name])
    found["vae_logsnr"] = Measure(
        "vae_logsnr", reconstruction.logsnr, False, None, reconstruction.count, MEANING["vae_logsnr"]
    )
    return [found[name] for name in MEANING]


def _show(samples: Sequence[Continuation], measures: Sequence[Measure], out: Path, seconds: float) -> None:
    """Samples and results on the terminal."""
    console = Console(highlight=False)
    console.print()
    for sample in samples:
        mark = f"[red]✗ {escape(sample.fault)}[/]" if sample.fault else "[green]✓[/]"
        console.print(f"[dim]{escape(sample.prompt)}[/][bold]{escape(sample.continuation)}[/] {mark}\n")
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for title in ("", "value", "95 % interval", "what it says"):
        table.add_column(title, justify="right" if title in ("value", "95 % interval") else "left")
    for measure in measures:
        if measure.name in HEADLINES:
            table.add_row(measure.label, f"[bold]{measure.text}[/]", measure.interval_text, measure.meaning)
    console.print(table)
    console.print(f"\n{seconds / 60:.1f} minutes in all. Report: {out / 'report.html'}")
