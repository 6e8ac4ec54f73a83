"""Continue prompts.

A single prompt is continued before your eyes, several are printed as they are done. The same seed gives the same
texts, alone or in any batch.

examples:
  opencola generate --prompt "Once upon a time"
  opencola generate --model runs/demo --prompt "The fox" "The bear" --steps 32 --seed 7
  opencola generate --prompts-file prompts.txt --jsonl out.jsonl
"""

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import tyro

from opencola.checkpoints.hub import load
from opencola.commands.terminal import ModelFlags, check_apart, read_flags, read_prompts, show
from opencola.errors import UserError
from opencola.models.language_model import LanguageModel
from opencola.models.text_stream import TextPiece, generate_text
from opencola.ranges import Count, check
from opencola.storage import growing
from opencola.text.lines import append_objects, check_text
from opencola.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerateFlags(ModelFlags):
    """What to continue, and where to keep it."""

    prompt: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """A text to continue (to answer, with --chat); may be given several times."""
    prompts_file: Path | None = None
    """File of further prompts: a .txt file with one in each line, or a .jsonl file of objects with a field `prompt`;
    `-` reads lines of either kind from standard input."""
    jsonl: Path | None = None
    """Write prompts, continuations and settings into this file, one JSON object in a line; one that is there is
    replaced when all are made. Ctrl-C keeps what is done, of x.jsonl in x.draft.jsonl."""
    batch_size: Count = 16
    """Number of prompts to continue at a time: speed and memory; the texts do not depend on it."""

    def __post_init__(self) -> None:
        check(self)


def command(argv: Sequence[str]) -> None:
    """Run `opencola generate`."""
    options: GenerateFlags = read_flags(GenerateFlags, argv, prog="opencola generate", description=__doc__)
    prompts = list(itertools.chain.from_iterable(options.prompt))
    if options.prompts_file is not None:
        prompts += read_prompts(options.prompts_file)
        check_apart(options.jsonl, options.prompts_file, "prompts")
    if not prompts:
        raise UserError("nothing to continue: give --prompt TEXT or --prompts-file FILE")
    for prompt in prompts:
        check_text(prompt, f"prompt {prompt!r}")
    model, tokenizer = load(options.model)
    with contextlib.ExitStack() as stack:
        file = None
        if options.jsonl is not None:
            file = stack.enter_context(growing(options.jsonl))
        for first in range(0, len(prompts), options.batch_size):
            ids = list(range(first, min(first + options.batch_size, len(prompts))))
            write_batch(model, tokenizer, prompts, ids, options, file)


def write_batch(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    ids: list[int],
    options: GenerateFlags,
    file: TextIO | None,
) -> None:
    """Continue the prompts of these ids: a single one as it is written, several when they are done."""
    alone = len(prompts) == 1
    pieces_of: dict[int, list[TextPiece]] = {i: [] for i in ids}
    between = "\n" if options.sampling.chat else ""
    if alone:
        show(prompts[0] + between, bold=True)
    for pieces in generate_text(model, tokenizer, [prompts[i] for i in ids], options.sampling, ids):
        for piece in pieces:
            pieces_of[ids[piece.sample]].append(piece)
            if alone:
                show(piece.text)
    if alone:
        print()
    for i, pieces in pieces_of.items():
        text = "".join(piece.text for piece in pieces)
        if not alone:
            print(f"[{i}] ", end="")
            show(prompts[i] + between, bold=True)
            show(f"{text}\n\n")
        if file is not None:
            record = {
                "id": i,
                "prompt": prompts[i],
                "continuation": text,
                "finished": pieces[-1].finished,
                "ids": [token for piece in pieces for token in piece.tokens],
                "seed": options.sampling.seed,
                "settings": asdict(options.sampling),
                "model": str(options.model),
            }
            append_objects(file, [record])
