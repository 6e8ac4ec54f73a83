"""Turn text into shards of token ids, which training reads without tokenising, whatever their size.

SOURCE is what --data.source takes: a .txt, .jsonl or .parquet file, a folder of these, hf:NAME[:CONFIG][@SPLIT],
bible or stories; or -, which is standard input, read as .jsonl where it begins with an object, else as .txt. After
Ctrl-C, a crash or a full disk the same command goes on; it also checks what is there, and writes anew what is damaged.

examples:
  opencola tokenize texts/ --to tokens --vocab-size 8192
  opencola tokenize hf:roneneldan/TinyStories --to tokens --tokenizer runs/mine --workers 8
  opencola train text --data.source tokens --out runs/mine
"""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from opencola.data.shard_writer import Order, tokenise
from opencola.data.sources import skipped
from opencola.ranges import Count
from opencola.run import flags
from opencola.text.files import Blank


@dataclass(frozen=True, kw_only=True)
class TokenizeFlags(Order):
    """What to tokenise, and where to."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """Where documents come from, written like data.source of a recipe; `-` is standard input."""
    to: Path
    """Folder to write the shards and their tokenizer to."""
    workers: Count = os.cpu_count() or 1
    """Number of processes that tokenise; what is written does not depend on it."""


def command(argv: Sequence[str]) -> None:
    """Run `opencola tokenize`."""
    options: TokenizeFlags = flags.parse(TokenizeFlags, argv, prog="opencola tokenize", description=__doc__)
    if said := skipped(options.source):
        print(said, file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"), TimeElapsedColumn())
    console = Console(stderr=True)
    # where nothing can be taken back, a bar would stand in front of the error that ends it
    with Progress(*columns, console=console, disable=not console.is_interactive) as bar:
        task = bar.add_task("tokenising", total=options.limit, rate="")
        first = None
        for done in tokenise(options, options.to, options.workers):
            first = first or done
            seconds = bar.tasks[task].elapsed or 0.0
            rate = f"{(done.tokens - first.tokens) / seconds:,.0f} tokens/s" if done != first else ""
            said = f"{done.documents:,} documents, {done.tokens:,} tokens"
            bar.update(task, completed=done.documents, description=said, rate=rate)
    if said := Blank(done.blank).said(options.source):
        print(said, file=sys.stderr)
    print(
        f"{done.tokens:,} tokens of {done.documents:,} documents, in {done.shards} shards, are in {options.to}. "
        f"Train on them: opencola train text --data.source {shlex.quote(str(options.to))}"
    )
