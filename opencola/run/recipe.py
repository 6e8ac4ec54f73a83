"""A recipe: everything a training run depends on, in a YAML file that is read like a command line.

The file's keys are the flags' names, nested: `train: {steps: 10}` is `--train.steps 10`, and both go through the same
parser. Keys at the top are shared by all stages; `stages` maps names to what is different there:

    out: runs/stories
    data: {length: 128, batch_size: 16}
    stages:
      vae: {family: vae, train: {steps: 2000}}
      prior: {family: cola, init: vae, train: {steps: 5000}}

A stage writes to `out`/<its name>, and `init` may name an earlier stage. Without `stages` the file is a single stage
that writes to `out` itself. `base: FILE` names another recipe file, whose values hold where this one has none.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import tyro
import yaml

from opencola.checkpoints.settings import without_others
from opencola.data.corpus import CorpusConfig
from opencola.errors import UserError
from opencola.models.sampling import Sampling
from opencola.paths import home
from opencola.ranges import Count, Seed, check
from opencola.run import flags
from opencola.storage import write_text
from opencola.train.loop import TrainConfig
from opencola.vae.text_vae import ReleaseConventions

Model = TypeVar("Model")
Settings = TypeVar("Settings", bound=Sampling)
Families = Callable[[str], type]
Samplings = Callable[[str], type[Sampling]]
# A wheel has recipes/ inside the package, a checkout beside it.
PACKAGE = Path(__file__).parent.parent
CONVENTIONS = {field.name for field in dataclasses.fields(ReleaseConventions)}
FOLDERS = (PACKAGE / "recipes", PACKAGE.parent / "recipes")


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer to use: an existing one, or a new one trained on the corpus."""

    path: Path | None = None
    """An existing tokenizer.json; without it the one of `init` is used or, without `init`, that of the tokenised
    corpus, or a new one is trained."""
    vocab_size: Count = 4096
    """Size of a newly trained vocabulary, special tokens included."""
    special: tuple[str, ...] = ()
    """Further special tokens of a new tokenizer, such as the marks <|im_start|> and <|im_end|> of conversations."""
    train_documents: Count = 10_000
    """Number of documents of the corpus, the first ones, that a new tokenizer is trained on."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class Recipe(Generic[Model, Settings]):
    """One training stage."""

    family: str
    """Model family; it decides which fields `model` has, so only the recipe file can set it."""
    out: Path
    """Folder for results; with several stages, each has a folder in it."""
    seed: Seed = 0
    """Seed of everything random: initial weights, order of the corpus, noise."""
    init: Path | None = None
    """Folder of an earlier run or of an exported model whose weights and tokenizer to start from."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Which tokenizer to use, or how to train one."""
    data: CorpusConfig
    """What to train on, and how it is cut into sequences."""
    valid: str | None = None
    """Source of validation documents, written like data.source."""
    model: Model
    """Sizes of the model, and its training objective."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How to train: steps, optimizer, devices, records and checkpoints."""
    sampling: Settings
    """Settings of generation that the trained model brings along."""

    def __post_init__(self) -> None:
        check(self)


def read(
    recipe: str | Path, argv: Sequence[str], families: Families, samplings: Samplings
) -> list[tuple[str, Recipe[Any, Any]]]:
    """The stages of a recipe, by name and in order, with the flags of `argv` over all of them.

    `recipe` is a YAML file or the name of a shipped recipe; `families` gives a family's config, `samplings` its
    settings of generation; both raise UserError for an unknown name. A flag counts in every stage that has it; at least
    one must. Raises FileNotFoundError and UserError with one line that names the file and key, or the flag; `--help`
    prints every stage's flags with the recipe's values as defaults and raises SystemExit.
    """
    path = find(recipe)
    from_file: dict[str, tuple[Recipe[Any, Any], str | None]] = {}
    several, stages = _stages(path)
    for name, values in stages.items():
        where = f"{path}: stage {name}" if several else str(path)
        init = values.pop("init") if values.get("init") in [*from_file] else None
        if "family" not in values:
            raise UserError(f"{where}: the key 'family' is missing")
        try:
            settings = samplings(values["family"])
            stage = _type(families(values["family"]), settings)
            values["sampling"] = own_settings(values.get("sampling", {}), settings)
            parsed, unknown = _parse(stage, flags.words_of(values))
            if unknown:
                _parse(stage, unknown, parsed, strict=True)
        except ValueError as error:
            raise UserError(f"{where}: {re.sub(r'--(?=[a-z])', '', str(error))}") from None
        from_file[name] = parsed, init
    if {"-h", "--help"} & {*argv}:
        for name, (default, _) in from_file.items():
            with contextlib.suppress(SystemExit):
                tyro.cli(_type_of(default), args=["--help"], default=default, prog=f"{path.name}, {name}", **_STYLE)
        raise SystemExit(0)
    return _override(path, from_file, argv, several)


def find(recipe: str | Path) -> Path:
    """The path itself if it is a file, else that of the shipped recipe of this name. Raises FileNotFoundError."""
    recipe = home(recipe)
    if recipe.is_file():
        return recipe
    files = [(path.relative_to(folder), path) for folder in FOLDERS for path in sorted(folder.rglob("*.yaml"))]
    shipped = {name.with_suffix("").as_posix(): path for name, path in files}
    if str(recipe) not in shipped:
        raise FileNotFoundError(f"{recipe}: no such file, and the shipped recipes are: {', '.join(shipped) or 'none'}")
    return shipped[str(recipe)]


def dump(recipe: Recipe[Any, Any], path: Path) -> None:
    """Write a single stage as a recipe file that reads back to the same recipe."""
    write_text(path, yaml.safe_dump(values(recipe), sort_keys=False, allow_unicode=True))


def values(recipe: Recipe[Any, Any]) -> dict[str, Any]:
    """A stage's settings as nested plain values, as its file has them."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(recipe))
    return plain


def up_to_date(values: dict[str, Any]) -> dict[str, Any]:
    """A stage's nested values with each key where it is today: files of version 0.1 have `model.vae.release`'s in
    `model.vae`."""
    match values:
        case {"model": {"vae": dict(vae)} as model}:
            moved = {name: vae[name] for name in vae if name in CONVENTIONS}
            kept = {name: vae[name] for name in vae if name not in moved}
            return values | {"model": _merged(model | {"vae": kept}, {"vae": {"release": moved}} if moved else {})}
    return values


class _Loader(yaml.SafeLoader):
    """YAML that refuses a repeated key, of which all but the last value would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As in the base class."""
        seen: set[str] = set()
        for key, _ in node.value:
            if (name := str(key.value)) in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {name!r} is there twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _stages(path: Path) -> tuple[bool, dict[str, dict[str, Any]]]:
    """Whether the file has a `stages` key, and each stage's values with the shared ones below them."""
    shared = _load(path)
    if "base" in shared:
        base = path.parent / home(str(shared.pop("base")))
        if not base.is_file():
            raise FileNotFoundError(f"{path}: base {base}: no such file")
        below = _load(base)
        if "base" in below:
            raise UserError(f"{path}: base {base} has a base of its own: name a recipe that is complete")
        shared = _merged(below, shared)
    if "stages" not in shared:
        return False, {str(shared.get("family")): up_to_date(shared)}
    stages = shared.pop("stages")
    if not isinstance(stages, dict) or not stages or not all(isinstance(stage, dict) for stage in stages.values()):
        raise UserError(f"{path}: 'stages' maps the stages' names to their keys and values")
    return True, {str(name): up_to_date(_merged(shared, stage)) for name, stage in stages.items()}


def _load(path: Path) -> dict[str, Any]:
    """The keys and values of a file."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values")
    return values


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(below[key], above[key]) for key in above if _are_dicts(below.get(key), above[key])}
    return {**below, **above, **both}


def _are_dicts(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _override(
    path: Path, from_file: dict[str, tuple[Recipe[Any, Any], str | None]], argv: Sequence[str], several: bool
) -> list[tuple[str, Recipe[Any, Any]]]:
    """Lay the command line over the stages, and settle the folders they write to and start from."""
    unknown: list[list[str]] = []
    done: dict[str, Recipe[Any, Any]] = {}
    for name, (default, init) in from_file.items():
        recipe, rest = _parse(_type_of(default), argv, default)
        unknown.append(rest)
        if recipe.family != default.family:
            raise UserError("--family cannot be changed on the command line: edit the recipe file")
        if recipe.init and not recipe.init.exists():
            raise FileNotFoundError(
                f"{path}: stage {name}: init {recipe.init} is neither an earlier stage nor a folder"
            )
        start = recipe.init or (done[init].out if init else None)
        done[name] = dataclasses.replace(recipe, out=recipe.out / name if several else recipe.out, init=start)
    for rest, (default, _) in zip(unknown, from_file.values(), strict=True):
        stray = [token for token in rest[:1] if not token.startswith("--")]
        nowhere = [token for token in rest if token.startswith("--") and all(token in other for other in unknown)]
        for token in nowhere:
            if token.startswith("--sampling."):
                raise default.sampling.lacks(token.partition("=")[0])
        if stray or nowhere:
            try:
                _parse(_type_of(default), stray + nowhere, default, strict=True)
            except UserError as error:
                raise UserError(f"{error}{flags.advice(str(error), argv)}") from None
    return [*done.items()]


def own_settings(values: Any, settings: type[Sampling]) -> Any:
    """The values of `sampling:` in a file. Raises UserError for a setting that the family does not have."""
    if not isinstance(values, dict):
        return values
    hints = settings.hints()
    if hints.keys() <= values.keys():  # written by `dump`, maybe when every family had the settings of all
        values = without_others(values, hints)
    for name in values:
        if name not in hints:
            raise settings.lacks(f"sampling.{name}")
    return values


_STYLE: dict[str, Any] = {"use_underscores": True, "config": (tyro.conf.FlagConversionOff,)}


def _type(config: type, settings: type[Sampling]) -> Any:
    """The recipe of a family, by the classes of its configuration and of its settings of generation."""
    return Recipe[config, settings]  # type: ignore[valid-type]


def _type_of(stage: Recipe[Any, Any]) -> Any:
    """The recipe of a stage's family."""
    return _type(type(stage.model), type(stage.sampling))


def _parse(
    stage: Any, args: Sequence[str], default: Recipe[Any, Any] | None = None, strict: bool = False
) -> tuple[Recipe[Any, Any], list[str]]:
    """Parse flags; returns the recipe and, unless `strict`, the tokens not understood. Raises UserError, one line."""
    options: dict[str, Any] = {"return_unknown_args": not strict, **_STYLE}
    if default is not None:
        options["default"] = default
    parsed = flags.parse(stage, args, prog="recipe", **options)
    return (parsed, []) if strict else parsed


def _plain(value: Any) -> Any:
    """Values as YAML has them."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
