"""What came out of a matched run: measures of every family, as JSONL, a table and a figure."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from experiments.matched import FAMILIES, Options, Stages, num_parameters, step_flops
from opencola.checkpoints.hub import load
from opencola.checkpoints.settings import load_sampling
from opencola.evaluation.statistics import bits_per_token
from opencola.evaluation.writing import (
    Continuation,
    LastWord,
    continuation_shares,
    held_out,
    last_word_scores,
    write_stories,
)
from opencola.models.ar.score import ARScoring
from opencola.models.bounds import BoundScoring
from opencola.models.build import WholeModel
from opencola.models.cola.score import Scoring
from opencola.models.sampling import Sampling
from opencola.storage import write_text
from opencola.text.lines import last_object, write_objects
from opencola.text.tokenizer import Tokenizer
from opencola.worlds.stories import Story, log_probability

SCORING: dict[str, Any] = {
    "cola": Scoring(solver="heun", steps=12, samples=8, divergence="hutchinson", estimator="iwae", rows=32),
    "ar": ARScoring(),
    "llada": BoundScoring(samples=128, rows=64),
    "plaid": BoundScoring(samples=128, rows=64),
}
TITLES = {"cola": "Cola DLM", "ar": "AR", "llada": "LLaDA", "plaid": "Plaid"}
SPEED_TOKENS = 64


def measure_all(options: Options, recipes: Mapping[str, Stages], tokenizer: Tokenizer) -> None:
    """Measure the families that were asked for, and render what is known of all."""
    for family in options.families:
        note = options.out / family / "measures.json"
        settings = {"stories": options.stories, "scored": options.scored, "scoring": asdict(SCORING[family])}
        if not note.is_file() or json.loads(note.read_text())["settings"] != settings:
            print(f"measuring {family}", flush=True)
            measured = {"settings": settings, "rows": list(measure(family, options, recipes[family], tokenizer))}
            write_text(note, json.dumps(measured, indent=2) + "\n")
    rows: list[dict[str, Any]] = []
    for folder in (options.out / family for family in FAMILIES):
        if (folder / "measures.json").is_file():
            fast = speed(folder)  # one after another: only what is measured together compares
            rows += [row | fast for row in json.loads((folder / "measures.json").read_text())["rows"]]
    rows.append(the_world(options, tokenizer))
    write_objects(options.out / "results.jsonl", rows)
    table = render(rows)
    write_text(options.out / "matched.md", table)
    draw(rows, options.out / "matched.svg")
    print(table)


def measure(family: str, options: Options, stages: Stages, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """A row for each way in which a family writes: greedily and by drawing, where it has tokens to draw."""
    folder = options.out / family
    model, _ = load(folder)
    model.requires_grad_(False)
    own = load_sampling(folder)
    shared = {
        "family": family,
        **training(folder, stages, tokenizer),
        **bits(family, model, tokenizer, held_out(options.scored)),
    }
    for temperature in (0.0, 1.0) if family in ("ar", "llada") else (0.0,):
        sampling = replace(own, temperature=temperature)
        yield {
            **shared,
            "temperature": temperature,
            **stories_of(model, tokenizer, sampling, held_out(options.stories)),
        }


def training(folder: Path, stages: Stages, tokenizer: Tokenizer) -> dict[str, Any]:
    """What training took, stages together; 6 N D and counted operations (model.md §7), seconds by the clock."""
    core, total = num_parameters(stages, tokenizer)
    taken = {"steps": 0, "tokens": 0, "flops": 0, "flops_6nd": 0, "seconds": 0.0}
    for name, recipe in stages:
        last = last_object(recipe.out / "metrics.jsonl")
        count, _ = num_parameters([(name, recipe)], tokenizer)
        taken["steps"] += last["step"]
        taken["tokens"] += last["tokens"]
        taken["flops"] += last["step"] * step_flops(name, recipe, tokenizer)
        taken["flops_6nd"] += 6 * count * last["tokens"]
        taken["seconds"] += last["seconds"]
    peak = json.loads((folder / "usage.json").read_text())["peak_bytes"]
    return {"core": core, "parameters": total, **taken, "peak_bytes": peak}


def stories_of(model: WholeModel, tokenizer: Tokenizer, sampling: Sampling, stories: Sequence[Story]) -> dict[str, Any]:
    """The story world's verdicts, shares with their 95 % intervals."""
    continuations, last_words, _ = write_stories(model, tokenizer, sampling, stories)
    return verdicts(continuations, last_words)


def verdicts(continuations: Sequence[Continuation], last_words: Sequence[LastWord]) -> dict[str, Any]:
    """The world's, shares with their 95 % intervals."""
    shares = continuation_shares(continuations)
    chosen = {name: shares[name] for name in ("legal_sentences", "consistent_stories", "distinct_continuations")}
    chosen["last_word_accuracy"] = last_word_scores(last_words)[0]
    return {name: asdict(value) for name, value in chosen.items()}


def bits(family: str, model: WholeModel, tokenizer: Tokenizer, stories: Sequence[Story]) -> dict[str, Any]:
    """By the family's own estimator, over whole stories with their end-of-text tokens; parts in bits a token, too."""
    texts = [[*tokenizer.encode(tale.text), tokenizer.eos_id] for tale in stories]
    score = model.score([[]] * len(texts), texts, SCORING[family], pad_id=tokenizer.eos_id)
    num_tokens = int(score.num_tokens.sum())
    # the stories' spread matters more than the draws', and holds it
    value, error = bits_per_token(score.total, num_tokens)
    parts = {**score.parts, **extra(score.others)}
    return {
        "bits_per_token": value,
        "bits_error": error,
        "kind": score.kind,
        "estimator": score.estimator,
        "parts": {name: bits_per_token(log_p, num_tokens)[0] for name, log_p in parts.items()},
    }


def extra(others: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The ELBO, where there is one beside the IWAE."""
    return {"elbo": others["elbo"]} if "elbo" in others else {}


def the_world(options: Options, tokenizer: Tokenizer) -> dict[str, Any]:
    """The row of the generator of the stories, whose log-probabilities are exact."""
    stories = held_out(options.scored)
    nats = torch.tensor([log_probability(tale.text) for tale in stories], dtype=torch.float64)
    value, error = bits_per_token(nats, sum(len(tokenizer.encode(tale.text)) + 1 for tale in stories))
    return {
        "family": "world",
        "bits_per_token": value,
        "bits_error": error,
        "kind": "exact",
        "estimator": "the generator",
    }


def speed(folder: Path) -> dict[str, Any]:
    """Tokens a second, alone and 16 at a time, the best of three; and evaluations that wait for each other, a token."""
    model, tokenizer = load(folder)
    model.requires_grad_(False)
    sampling = load_sampling(folder)
    prompt = tokenizer.encode(held_out(1)[0].sentences[0])
    settings = replace(sampling, max_new_tokens=SPEED_TOKENS, ignore_eos=True)
    rates = {}
    for batch in (1, 16):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            list(model.generate([prompt] * batch, settings))
            seconds.append(time.perf_counter() - start)
        rates[f"tokens_per_second_{batch}"] = batch * SPEED_TOKENS / min(seconds)
    return {**rates, "evaluations_per_token": evaluations(model, prompt, settings) / SPEED_TOKENS}


def evaluations(model: WholeModel, prompt: list[int], sampling: Any) -> int:
    """Passes through the networks that write (of Cola DLM: prior and decoder), those of the prompt among them."""
    counted = 0

    def count(*_: Any) -> None:
        nonlocal counted
        counted += 1

    first = ("dit.blocks.0", "vae.decoder.0", "trunk.blocks.0")
    handles = [module.register_forward_pre_hook(count) for name, module in model.named_modules() if name in first]
    list(model.generate([prompt], sampling))
    for handle in handles:
        handle.remove()
    return counted


COLUMNS = (
    ("core", "core, M", lambda row: f"{row['core'] / 1e6:.2f}"),
    ("parameters", "all parameters, M", lambda row: f"{row['parameters'] / 1e6:.2f}"),
    ("steps", "steps", lambda row: f"{row['steps']:,}"),
    ("tokens", "tokens, M", lambda row: f"{row['tokens'] / 1e6:.1f}"),
    ("flops", "counted, TFLOP", lambda row: f"{row['flops'] / 1e12:.1f}"),
    ("flops_6nd", "6 N D, TFLOP", lambda row: f"{row['flops_6nd'] / 1e12:.1f}"),
    ("seconds", "minutes", lambda row: f"{row['seconds'] / 60:.1f}"),
    ("peak_bytes", "peak, GB", lambda row: f"{row['peak_bytes'] / 1e9:.2f}"),
    ("last_word_accuracy", "last word", lambda row: percent(row["last_word_accuracy"])),
    ("legal_sentences", "legal sentences", lambda row: percent(row["legal_sentences"])),
    ("consistent_stories", "consistent stories", lambda row: percent(row["consistent_stories"])),
    ("distinct_continuations", "distinct", lambda row: percent(row["distinct_continuations"])),
    ("bits_per_token", "bits a token", lambda row: f"{row['bits_per_token']:.3f} ± {row['bits_error']:.3f}"),
    ("kind", "which is", lambda row: row["kind"]),
    ("tokens_per_second_1", "tokens/s, 1", lambda row: f"{row['tokens_per_second_1']:.0f}"),
    ("tokens_per_second_16", "tokens/s, 16", lambda row: f"{row['tokens_per_second_16']:.0f}"),
    ("evaluations_per_token", "evaluations a token", lambda row: f"{row['evaluations_per_token']:.2f}"),
)


def percent(share: Mapping[str, float]) -> str:
    """A share and its interval."""
    return f"{100 * share['value']:.1f} ({100 * share['low']:.1f}–{100 * share['high']:.1f})"


def name_of(row: Mapping[str, Any]) -> str:
    """How a row is called."""
    if row["family"] == "world":
        return "the world"
    drawn = {0.0: ", greedy", 1.0: ", drawn"}[row["temperature"]] if row["family"] in ("ar", "llada") else ""
    return TITLES[row["family"]] + drawn


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, measures in its rows, and the estimators below it."""
    lines = [["", *map(name_of, rows)], ["---"] * (1 + len(rows))]
    for key, title, text in COLUMNS:
        lines.append([title, *(text(row) if key in row else "" for row in rows)])
    estimators = dict.fromkeys(
        f"{TITLES[row['family']]}: {row['estimator']}" for row in rows if row["family"] in TITLES
    )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\nShares in percent with 95 % intervals. Bits a token by {'; '.join(estimators)}.\n"


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Bars of the shares with their intervals, and of the bits a token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, 4)
    written = [row for row in rows if "last_word_accuracy" in row]
    for panel, key in zip(panels, ("last_word_accuracy", "legal_sentences", "consistent_stories"), strict=False):
        values = [100 * row[key]["value"] for row in written]
        errors = [[100 * abs(row[key]["value"] - row[key][end]) for row in written] for end in ("low", "high")]
        panel.barh([name_of(row) for row in written], values, xerr=errors, color="#2f7ed8", height=0.6)
        panel.set_title(key.replace("_", " "))
        panel.set_xlabel("percent, 95 % interval")
        panel.set_xlim(0, 100)
        panel.invert_yaxis()
    bits = {TITLES.get(row["family"], "the world"): row for row in rows}
    values = [row["bits_per_token"] for row in bits.values()]
    panels[3].barh([*bits], values, xerr=[row["bits_error"] for row in bits.values()], color="#e8710a", height=0.6)
    panels[3].set_title("bits a token")
    panels[3].set_xlabel("by each family's own estimator")
    panels[3].invert_yaxis()
    figure.savefig(file)
