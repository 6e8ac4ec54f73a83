"""What commands with a model share: its flags, prompts in files, and text on a terminal."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro

from opencola.checkpoints.hub import SHIPPED, locate
from opencola.checkpoints.settings import load_sampling
from opencola.errors import UserError
from opencola.models import build
from opencola.models.sampling import Sampling
from opencola.run import flags
from opencola.storage import draft_of
from opencola.text.lines import check_text, holds_object, is_pipe, parse_json, read_lines

# What a terminal would obey instead of showing: control characters other than tab and line feed.
CONTROL = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "�")


@dataclass(frozen=True)
class Named:
    """Which model."""

    model: Path = SHIPPED
    """Folder of a run or of an exported model, or a repository of the Hugging Face Hub (OWNER/NAME); without it the
    model that comes with the package writes."""


@dataclass(frozen=True)
class ModelFlags(Named):
    """Which model writes, and how."""

    sampling: tyro.conf.OmitArgPrefixes[Any] = field(default_factory=Sampling)
    """Settings of generation, those of the model's family; the defaults are the model's own."""


def read_flags(
    target: type, argv: Sequence[str], settings: Mapping[str, Any] | None = None, given: Any = None, **options: Any
) -> Any:
    """Parse a command's flags, whose defaults depend on the model that they name.

    settings: of generation, that are the command's own whatever the model; given: defaults of further fields. Raises
    UserError, for a setting that the model's family does not have with the names of those it has.
    """
    model = read_model(argv)
    sampling = replace(load_sampling(locate(model)), **settings or {})
    try:
        return flags.parse(target, argv, default=target(model=model, sampling=sampling, **given or {}), **options)
    except UserError:
        for word in argv:
            name = word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
            if word.startswith("--") and name in build.SETTINGS - sampling.hints().keys():
                raise sampling.lacks(flag(name), flag) from None
        raise


def flag(setting: str) -> str:
    """How a setting is written on the command line."""
    return f"--{setting.replace('_', '-')}"


def read_model(argv: Sequence[str]) -> Path:
    """The model that a command's flags name. The others are left alone: what they may be depends on its family."""
    options: Named = flags.parse(Named, argv, return_unknown_args=True, add_help=False)[0]
    return options.model


def check_apart(jsonl: Path | None, file: Path, what: str) -> None:
    """Raise UserError where --jsonl would write over the file that is read."""
    if jsonl is not None and not is_pipe(file):
        for out in (jsonl, draft_of(jsonl)):
            if out.exists() and out.samefile(file):
                raise UserError(f"{out} holds the {what}: choose another file for --jsonl")


def read_prompts(file: Path) -> list[str]:
    """Prompts from a .txt or .jsonl file; blank lines are none.

    Raises FileNotFoundError, and UserError naming the line that is no prompt.
    """
    lines = read_lines(file, "prompts")
    prompts = [prompt_of(line, place) if holds_object(file, line) else line for place, line in lines]
    if not prompts:
        raise UserError(f"{file} holds no prompts")
    return prompts


def prompt_of(line: str, place: str) -> str:
    """The prompt in a line of a .jsonl file; raises ValueError, naming the place, where it holds none."""
    row = parse_json(line, place)
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(f"{place}: expected an object with a string in its field 'prompt'")
    check_text(row["prompt"], place)
    return row["prompt"]


def show(text: str, bold: bool = False) -> None:
    """Print text as it is; on a terminal, without what that would obey, and in bold letters if asked."""
    if sys.stdout.isatty():
        text = text.translate(CONTROL)
        text = f"\033[1m{text}\033[0m" if bold else text
    print(text, end="", flush=True)
