"""Score texts: log-probabilities, as bounds or estimates, labelled by how they were computed.

Prints the chosen estimate with its standard error, the terms of the ELBO, perplexity and bits per byte; --jsonl
keeps them all, by block too. Ctrl-C keeps what is done, of --jsonl x.jsonl in x.draft.jsonl.

examples:
  opencola score texts.txt
  opencola score texts.jsonl --model runs/demo --jsonl scores.jsonl --divergence exact --samples 32
  opencola score answers.jsonl --conditional joint --estimator elbo --solver dopri5 --tolerance 1e-3
"""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from opencola.checkpoints import hub
from opencola.checkpoints import parts as layout
from opencola.commands import terminal
from opencola.errors import UserError
from opencola.evaluation.likelihood import read_pairs, score_pairs, together, total
from opencola.evaluation.screen import progress_bar, put, table
from opencola.models import build
from opencola.run import flags
from opencola.storage import growing
from opencola.text.lines import append_objects

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class ScoreFlags(flags.OutputFlags, Generic[Settings]):
    """What to score, and how."""

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """A .txt file with a text in each line, or a .jsonl file of objects with a field `text`, or with `prompt` and
    `continuation`; `-` reads lines of either kind from standard input."""
    model: Path = hub.SHIPPED
    """Folder of a run or of an exported model, or a repository of the Hugging Face Hub (OWNER/NAME); without it the
    model that comes with the package. Its family decides which flags there are."""
    jsonl: Path | None = None
    """Write all figures into this file, one JSON object in a line; one that is there is replaced when all are made."""
    end_of_text: bool = True
    """Score the end-of-text token behind every text, too: its log-probability and one token more count."""
    allow_not_finite: bool = False
    """Go on after a text whose log-probability is not finite, which is an error without it: its figures are null, sums
    leave it out, and how many there are is said at the end."""
    scoring: tyro.conf.OmitArgPrefixes[Settings]
    """How log-probabilities are computed: settings of the model's family."""


def command(argv: Sequence[str]) -> None:
    """Run `opencola score`."""
    scoring = build.scoring_class(layout.family_in(hub.locate(terminal.read_model(argv))))
    target = ScoreFlags[scoring]  # type: ignore[valid-type]
    options: ScoreFlags[Any] = flags.parse(target, argv, prog="opencola score", description=__doc__)
    pairs = list(read_pairs(options.file))
    if not pairs:
        raise UserError(f"{options.file} holds no texts")
    terminal.check_apart(options.jsonl, options.file, "texts")
    model, tokenizer = hub.load(options.model)
    model.requires_grad_(False)  # a graph of the latents only
    records: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        stack.callback(put_total if options.json else show, records, len(pairs))  # what is done, after Ctrl-C too
        file = None
        if options.jsonl is not None:
            file = stack.enter_context(growing(options.jsonl))
        bar = stack.enter_context(progress_bar())
        task = bar.add_task("scoring", total=len(pairs))
        for ids in together(pairs, options.scoring.texts_at_a_time):
            batch = [pairs[i] for i in ids]
            for record in score_pairs(
                model, tokenizer, batch, ids, options.scoring, options.end_of_text, options.allow_not_finite
            ):
                record["model"] = str(options.model)
                records.append(record)
                if options.json:
                    append_objects(sys.stdout, [record])
                if file is not None:
                    append_objects(file, [record])
            bar.advance(task, len(ids))


def sums_of(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sums over all texts, where there are several to sum."""
    bad = sum(record["log_probability"] is None for record in records)
    return [total(records)] if len(records) > max(1, bad) else []


def put_total(records: Sequence[dict[str, Any]], asked: int) -> None:
    """The sums as a JSON line, with how many texts they are of, and of how many that were asked for."""
    append_objects(sys.stdout, ({**sums, "num_texts": len(records), "asked": asked} for sums in sums_of(records)))


def show(records: Sequence[dict[str, Any]], asked: int) -> None:
    """Print the figures as a table, and their sums."""
    if not records:
        return
    labels = {(record["kind"], record["estimator"]) for record in records}
    others = {"elbo": "ELBO"} if "elbo" in records[0] else {}
    terms = list(records[0]["parts"])
    for kind, label in sorted(labels):
        what = f"; {' + '.join(terms)} = {others.get('elbo', 'log p')}" if terms else ""
        print(f"log p in nats, {kind}: {label}{what}")
    grid = table("id", "tokens", "log p", "±", *others.values(), *terms, "ppl", "bits/byte", words=())
    bad = sum(record["log_probability"] is None for record in records)
    for record in [*records, *sums_of(records)]:
        values = [record["log_probability"], record["standard_error"], *(record[name] for name in others)]
        values += [*record["parts"].values(), record["perplexity"], record["bits_per_byte"]]
        shown = ["-" if value is None else f"{value:,.2f}" for value in values]
        grid.add_row(str(record["id"]), str(record["num_tokens"]), *shown)
    put(grid)
    if bad:
        print(f"{bad} of {len(records)} texts have no finite log-probability, and are in no sum")
    if len(records) < asked:
        print(f"{len(records)} of {asked} texts")
