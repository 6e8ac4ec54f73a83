"""Writing in the terminal, `opencola generate`, and what all commands with a model share: loading it, and its flags."""

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import tyro

from opencola import flags
from opencola.interop import hub, official
from opencola.models.build import WholeModel, device
from opencola.models.cola import Cola
from opencola.models.language_model import LanguageModel
from opencola.models.sampling import Sampling
from opencola.models.text_stream import TextPiece, generate_text
from opencola.text.tokenizer import Tokenizer

SHIPPED = Path(__file__).parent / "shipped"
# What a terminal would obey instead of showing: control characters other than tab and line feed.
CONTROL = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "�")


@dataclass(frozen=True)
class ModelFlags:
    """Which model writes, and how."""

    model: Path = SHIPPED
    """Folder of a run or of an exported model, or a repository of the Hugging Face Hub (OWNER/NAME); without it the
    model that comes with the package writes."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=Sampling)
    """Settings of generation; the defaults are the model's own."""


@dataclass(frozen=True)
class GenerateFlags(ModelFlags):
    """What to continue, and where to keep it."""

    prompt: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """Texts to continue (to answer, with --chat)."""
    prompts_file: Path | None = None
    """More of them: a .txt file with one in each line, or a .jsonl file of objects with a field `prompt`."""
    jsonl: Path | None = None
    """Write prompts, continuations and settings into this file, one JSON object in a line."""
    batch_size: int = 16
    """Prompts to continue at a time; the texts do not depend on it."""


def read_flags(
    target: type, argv: Sequence[str], settings: Mapping[str, Any] | None = None, given: Any = None, **options: Any
) -> Any:
    """Parse a command's flags, whose defaults depend on the model that they name.

    settings: of generation, that are the command's own whatever the model; given: defaults of further fields.
    """
    model = read_model(argv)
    sampling = replace(official.load_sampling(locate(model)), **settings or {})
    return flags.parse(target, argv, default=target(model=model, sampling=sampling, **given or {}), **options)


def read_model(argv: Sequence[str]) -> Path:
    """The model that a command's flags name, on which the others depend."""
    options: ModelFlags = flags.parse(ModelFlags, argv, return_unknown_args=True, add_help=False)[0]
    return options.model


def load(model: Path) -> tuple[WholeModel, Tokenizer]:
    """A model and its tokenizer. Raises FileNotFoundError, with what to do, where there is none."""
    loaded = hub.from_pretrained(locate(model))
    check_vocabulary(loaded.tokenizer, loaded.model.vocab_size, model)
    return loaded.model.to(device()), loaded.tokenizer


def load_cola(model: Path) -> tuple[Cola, Tokenizer]:
    """The same, for what only a model with latents can do. Raises ValueError for another one, too."""
    loaded, tokenizer = load(model)
    if not isinstance(loaded, Cola):
        raise ValueError(f"{model} holds a model without latents ({type(loaded).__name__}): name a Cola DLM")
    return loaded, tokenizer


def check_vocabulary(tokenizer: Tokenizer, known: int, model: Path) -> None:
    """Raise ValueError where a tokenizer has ids that the model beside it does not know."""
    if tokenizer.vocab_size > known:
        raise ValueError(f"the tokenizer in {model} has {tokenizer.vocab_size} ids, but its model knows {known}")


def locate(model: Path) -> Path:
    """The folder of a model that the user names. Errors as `load`."""
    if model == SHIPPED and not model.is_dir():
        raise FileNotFoundError(
            "no model comes with this installation: train one (opencola demo) and name it (--model)"
        )
    return hub.locate(model)


def title(model: Path) -> str:
    """The model's name in a report."""
    return "the shipped model" if model == SHIPPED else str(model)


def generate(argv: Sequence[str], description: str) -> None:
    """`opencola generate`."""
    options: GenerateFlags = read_flags(GenerateFlags, argv, prog="opencola generate", description=description)
    prompts = list(itertools.chain.from_iterable(options.prompt))
    if options.prompts_file is not None:
        prompts += read_prompts(options.prompts_file)
        if options.jsonl is not None and options.jsonl.exists() and options.jsonl.samefile(options.prompts_file):
            raise ValueError(f"{options.jsonl} holds the prompts: choose another file for --jsonl")
    if not prompts:
        raise ValueError("nothing to continue: give --prompt TEXT or --prompts-file FILE")
    for prompt in prompts:
        check_text(prompt, f"prompt {prompt!r}")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, but is {options.batch_size}")
    model, tokenizer = load(options.model)
    with contextlib.ExitStack() as stack:
        file = None
        if options.jsonl is not None:
            options.jsonl.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(options.jsonl.open("w", encoding="utf-8"))
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
    found: dict[int, list[TextPiece]] = {i: [] for i in ids}
    between = "\n" if options.sampling.chat else ""
    if alone:
        show(prompts[0] + between, bold=True)
    for pieces in generate_text(model, tokenizer, [prompts[i] for i in ids], options.sampling, ids):
        for piece in pieces:
            found[ids[piece.sample]].append(piece)
            if alone:
                show(piece.text)
    if alone:
        print()
    for i, pieces in found.items():
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
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()


def read_prompts(file: Path) -> list[str]:
    """Prompts from a .txt or .jsonl file; blank lines are none.

    Raises FileNotFoundError, and ValueError naming the line that is no prompt.
    """
    lines = read_lines(file, "prompts")
    prompts = [line if file.suffix == ".txt" else prompt_of(line, place) for place, line in lines]
    if not prompts:
        raise ValueError(f"{file} holds no prompts")
    return prompts


def read_lines(file: Path, what: str) -> Iterator[tuple[str, str]]:
    """The lines of a .txt or .jsonl file of `what`, but blank ones, each after the words for its place.

    Raises FileNotFoundError, and ValueError for other files and for a line, which it names, that is not UTF-8.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    if file.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{file}: {what} are in a .txt file, one in each line, or in a .jsonl file")
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        place = f"{file}, line {number}"
        try:
            text = line.decode().removesuffix("\r")
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: not UTF-8 at byte {error.start} of the line") from None
        if text.strip():
            yield place, text


def parse_json(line: str, place: str) -> Any:
    """What a line of a .jsonl file holds; raises ValueError, naming the place, where that is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON: {error}") from None


def prompt_of(line: str, place: str) -> str:
    """The prompt in a line of a .jsonl file; raises ValueError, naming the place, where it holds none."""
    row = parse_json(line, place)
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f"{place}: expected an object with a string in its field 'prompt'")
    check_text(row["prompt"], place)
    return row["prompt"]


def check_text(text: str, place: str) -> None:
    """Raise ValueError where a string is no text: halves of surrogate pairs, bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: not valid Unicode at character {error.start}") from None


def show(text: str, bold: bool = False) -> None:
    """Print text as it is; on a terminal, without what that would obey, and in bold letters if asked."""
    if sys.stdout.isatty():
        text = text.translate(CONTROL)
        text = f"\033[1m{text}\033[0m" if bold else text
    print(text, end="", flush=True)
