"""`opencola score`: log-probabilities of the texts in a file."""

import contextlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from opencola import console, flags
from opencola.interop import layout
from opencola.models import build
from opencola.models.language_model import LanguageModel, Score
from opencola.text.tokenizer import Tokenizer

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class ScoreFlags(Generic[Settings]):
    """What to score, and how."""

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """A .txt file with a text in each line, or a .jsonl file of objects with a field `text`, or with `prompt` and
    `continuation`."""
    model: Path = console.SHIPPED
    """Folder of a run or of an exported model, or a repository of the Hugging Face Hub (OWNER/NAME); without it the
    model that comes with the package. Its family decides which flags there are."""
    jsonl: Path | None = None
    """Write all figures into this file, one JSON object in a line."""
    end_of_text: bool = True
    """Score the end-of-text token behind every text, too."""
    scoring: tyro.conf.OmitArgPrefixes[Settings]
    """How."""


@dataclass(frozen=True)
class Pair:
    """A continuation and what comes before it, maybe nothing."""

    prompt: str
    continuation: str


def score(argv: Sequence[str], description: str) -> None:
    """`opencola score`."""
    scoring = build.scoring_class(layout.family_in(console.locate(console.read_model(argv))))
    target = ScoreFlags[scoring]  # type: ignore[valid-type]
    options: ScoreFlags[Any] = flags.parse(target, argv, prog="opencola score", description=description)
    pairs = list(read_pairs(options.file))
    if not pairs:
        raise ValueError(f"{options.file} holds no texts")
    if options.jsonl is not None and options.jsonl.exists() and options.jsonl.samefile(options.file):
        raise ValueError(f"{options.jsonl} holds the texts: choose another file for --jsonl")
    model, tokenizer = console.load(options.model)
    model.requires_grad_(False)  # a graph of the latents only
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    records: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        stack.callback(show, records, len(pairs))  # what is done, after Ctrl-C too
        file = None
        if options.jsonl is not None:
            options.jsonl.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(options.jsonl.open("w", encoding="utf-8"))
        bar = stack.enter_context(Progress(*columns, console=Console(stderr=True)))
        task = bar.add_task("", total=len(pairs))
        for ids in together(pairs, options.scoring.texts_at_a_time):
            for record in score_pairs(model, tokenizer, [pairs[i] for i in ids], ids, options):
                records.append(record)
                if file is not None:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    file.flush()
            bar.advance(task, len(ids))


def together(pairs: Sequence[Pair], size: int) -> Iterator[list[int]]:
    """Places of pairs to score at a time, in order; those with a prompt apart, as their scores are of another kind."""
    for _, group in itertools.groupby(range(len(pairs)), lambda place: bool(pairs[place].prompt)):
        places = list(group)
        yield from (places[first : first + size] for first in range(0, len(places), size))


def score_pairs(
    model: LanguageModel, tokenizer: Tokenizer, pairs: Sequence[Pair], ids: Sequence[int], options: ScoreFlags[Any]
) -> Iterator[dict[str, Any]]:
    """A record of every pair."""
    end = [tokenizer.eos_id] if options.end_of_text else []
    prompts = [tokenizer.encode(pair.prompt) for pair in pairs]
    continuations = [[*tokenizer.encode(pair.continuation), *end] for pair in pairs]
    # only an end of text tells the model that nothing follows, so blocks are filled up with more of them
    found = model.score(prompts, continuations, options.scoring, pad_id=tokenizer.eos_id, ids=ids)
    for place, (i, pair) in enumerate(zip(ids, pairs, strict=True)):
        record = {"id": i, **asdict(pair), "num_prompt_tokens": len(prompts[place])}
        if not pair.prompt:
            record = {"id": i, "text": pair.continuation}
        num_bytes = tokenizer.num_bytes(continuations[place][: int(found.num_tokens[place])])
        yield (
            record
            | figures(found, place, num_bytes)
            | {
                "settings": asdict(options.scoring),
                "end_of_text": options.end_of_text,
                "model": str(options.model),
            }
        )


def figures(score: Score, place: int, num_bytes: int) -> dict[str, Any]:
    """The labelled figures of one text, in nats but for the bits per byte; null where there are none."""
    total, tokens = score.total[place].item(), int(score.num_tokens[place])
    parts = {name: value[place].item() for name, value in score.parts.items()}
    blocks = score.blocks[place] if score.blocks else {}
    found = {
        "log_probability": total,
        "standard_error": score.standard_error[place].item(),
        "kind": score.kind,
        "estimator": score.estimator,
        "num_tokens": tokens,
        "num_bytes": num_bytes,
        "perplexity": math.exp(min(-total / tokens, 700)),
        "bits_per_byte": -total / math.log(2) / num_bytes if num_bytes else None,
        **{name: value[place].item() for name, value in score.others.items()},
        "parts": parts,
        "parts_per_token": {name: value / tokens for name, value in parts.items()},
        "parts_per_block": {name: value.tolist() for name, value in blocks.items()},
    }
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in found.items()}


def read_pairs(file: Path) -> Iterator[Pair]:
    """Texts from a .txt or .jsonl file; blank lines are none.

    Raises FileNotFoundError, and ValueError naming the line that holds none.
    """
    for place, line in console.read_lines(file, "texts"):
        yield Pair("", line) if file.suffix == ".txt" else pair_of(line, place)


def pair_of(line: str, place: str) -> Pair:
    """The text in a line of a .jsonl file; raises ValueError, naming the place, where it holds none."""
    match console.parse_json(line, place):
        case {"text": str(text)} if text:
            pair = Pair("", text)
        case {"prompt": str(prompt), "continuation": str(text)} if text:
            pair = Pair(prompt, text)
        case _:
            raise ValueError(f"{place}: expected strings in a field 'text', or in 'prompt' and 'continuation'")
    for text in (pair.prompt, pair.continuation):
        console.check_text(text, place)
    return pair


def show(records: Sequence[dict[str, Any]], asked: int) -> None:
    """Print the figures as a table, and their sums."""
    if not records:
        return
    labels = {(record["kind"], record["estimator"]) for record in records}
    sums = {"elbo": "ELBO"} if "elbo" in records[0] else {}
    terms = list(records[0]["parts"])
    for kind, label in sorted(labels):
        what = f"; {' + '.join(terms)} = {sums.get('elbo', 'log p')}" if terms else ""
        print(f"log p in nats, {kind}: {label}{what}")
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for name in ("id", "tokens", "log p", "±", *sums.values(), *terms, "ppl", "bits/byte"):
        table.add_column(name, justify="right")
    for record in [*records, *([total(records)] if len(records) > 1 else [])]:
        values = [record["log_probability"], record["standard_error"], *(record[name] for name in sums)]
        values += [*record["parts"].values(), record["perplexity"], record["bits_per_byte"]]
        shown = ["-" if value is None else f"{value:,.2f}" for value in values]
        table.add_row(str(record["id"]), str(record["num_tokens"]), *shown)
    Console().print(table)
    if len(records) < asked:
        print(f"{len(records)} of {asked} texts")


def total(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sums of all records, and what follows from them."""
    whole: dict[str, Any] = {"id": "all"}
    for name in ("num_tokens", "num_bytes", "log_probability", *(["elbo"] if "elbo" in records[0] else [])):
        whole[name] = sum(record[name] for record in records)
    errors = [record["standard_error"] for record in records]
    whole["standard_error"] = None if None in errors else math.hypot(*errors)
    whole["parts"] = {name: sum(record["parts"][name] for record in records) for name in records[0]["parts"]}
    nats = -whole["log_probability"]
    whole["perplexity"] = math.exp(min(nats / whole["num_tokens"], 700))
    whole["bits_per_byte"] = nats / math.log(2) / whole["num_bytes"] if whole["num_bytes"] else None
    return whole
