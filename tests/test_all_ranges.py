"""Every number that a user can set carries a range, and is held to it in Python, by flags, in recipes and in JSON.

The classes are those of the package's modules that settings are made of, and all that stands in their fields.
"""

import dataclasses
import importlib
import math
import pkgutil
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

import opencola
from opencola.checkpoints.files import checked
from opencola.errors import UserError
from opencola.models import build
from opencola.models.sampling import Sampling
from opencola.ranges import Range, ranged
from opencola.run import recipe as recipes
from opencola.train.loop import TrainConfig

SETTINGS = re.compile(r"\w*(Config|Conventions|Flags|Law|Likelihood|Objective|Order|Recipe|Sampling|Scoring)")
VALUES: tuple[Any, ...] = (-1, 0, math.nan, math.inf, -math.inf, 1e30, 2**64, 10**400, "", [0], True)


def parts(hint: Any) -> list[Any]:
    """A type, and the types that it is made of."""
    return [hint, *(inner for part in typing.get_args(hint) for inner in parts(part))]


def classes() -> list[type]:
    """The dataclasses of settings."""
    seen: dict[type, None] = {}
    for module in pkgutil.walk_packages(opencola.__path__, "opencola."):
        if module.name.endswith("__main__") or module.name == "opencola.evaluation.harness":  # an extra's
            continue
        for value in vars(importlib.import_module(module.name)).values():
            ours = isinstance(value, type) and value.__module__.startswith("opencola.")
            if ours and dataclasses.is_dataclass(value) and SETTINGS.fullmatch(value.__name__):
                seen[value] = None
    waiting = list(seen)
    while waiting:
        for hint in typing.get_type_hints(waiting.pop(), include_extras=True).values():
            for part in parts(hint):
                if isinstance(part, type) and dataclasses.is_dataclass(part) and part not in seen:
                    seen[part] = None
                    waiting.append(part)
    return sorted(seen, key=lambda config: f"{config.__module__}.{config.__name__}")


CLASSES = classes()
FIELDS = [(config, *field) for config in CLASSES for field in ranged(config)]


def made(config: type, **values: Any) -> Any:
    """A configuration with these values, and something in every field that has no default."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in values:
            kind = hints[field.name]
            values[field.name] = {int: 64, float: 1.0, str: "x", bool: False, Path: Path("x")}.get(kind)
    return config(**values)


def fits(value: Any, kind: Any, allowed: Range) -> bool:
    """Whether a number is of the type and in the range, said in another way than in the package."""
    number = typing.get_args(kind)[0]
    if type(value) not in ((int,) if number is int else (int, float)):
        return False
    text = str(value)
    if text in ("nan", "inf", "-inf") or len(text) > 300:
        return False
    low = value > allowed.low if allowed.above else value >= allowed.low
    return low and (value < allowed.high if allowed.below else value <= allowed.high)


def test_the_classes_are_there() -> None:
    names = {config.__name__ for config in CLASSES}
    wanted = {"TrainConfig", "OptimizerConfig", "CorpusConfig", "TokenizerConfig", "Recipe", "Order", "TimestepLaw"}
    wanted |= {"PriorObjective", "VAEObjective", "DiTConfig", "LlamaConfig", "ReleaseConventions", "InspectFlags"}
    for family in build.FAMILIES:
        wanted |= {build.config_class(family).__name__, build.sampling_class(family).__name__}
        wanted |= {build.scoring_class(family).__name__} if family != "vae" else set()
    assert wanted <= names and len(FIELDS) > 150


@pytest.mark.parametrize("config", CLASSES, ids=lambda config: config.__name__)
def test_every_number_carries_a_range(config: type) -> None:
    have = {name for name, *_ in ranged(config)}
    for name, hint in typing.get_type_hints(config).items():
        if {int, float} & {*parts(hint)} and typing.get_origin(hint) is not typing.ClassVar:
            assert name in have, f"{config.__name__}.{name} is a number without a range"


@pytest.mark.parametrize(("config", "name", "kind", "allowed", "optional"), FIELDS)
def test_every_number_is_held_to_its_range(config: type, name: str, kind: Any, allowed: Range, optional: bool) -> None:
    several = typing.get_args(kind) if typing.get_origin(kind) is tuple else ()
    for value in VALUES:
        given = (value,) * (len(several) if several[1:] != (...,) else 2) if several else value
        try:
            made(config, **{name: given})
        except UserError as error:
            if not fits(value, several[0] if several else kind, allowed):
                assert re.match(rf"{name} must be .*, but is {re.escape(repr(value))}$", str(error)), error
        else:
            assert fits(value, several[0] if several else kind, allowed), f"{value!r} is taken"
    if several:
        with pytest.raises(UserError, match=f"^{name} must be a list of numbers, but is 1$"):
            made(config, **{name: 1})
    elif not optional:
        with pytest.raises(UserError, match=f"^{name} must be .*, but is None$"):
            made(config, **{name: None})


def flags_of(config: Any, prefix: str = "") -> dict[str, Any]:
    """The flags of a configuration's numbers, nested ones too, with their types."""
    flags: dict[str, Any] = {}
    for name, kind, *_ in ranged(type(config)):
        flags[f"{prefix}{name}"] = kind
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            flags |= flags_of(value, f"{prefix}{field.name}.")
    return flags


@pytest.mark.parametrize("family", build.FAMILIES)
def test_flags_and_recipes_name_the_whole_path(family: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    plain: dict[str, Any] = {"out": "runs", "family": family, "data": {"length": 16, "batch_size": 4}}

    def read(values: dict[str, Any], *argv: str) -> Any:
        file.write_text(yaml.safe_dump(values))
        return recipes.read(file, argv, build.config_class, build.sampling_class)[0][1]

    flags = flags_of(read(plain))
    # all are parsed in one way: one of each group, so that this takes seconds
    for flag in {name.rpartition(".")[0]: name for name in flags}.values():
        *groups, name = flag.split(".")
        bad = math.nan if typing.get_args(flags[flag])[0] is float else -7
        said = rf"{re.escape(flag)} must be .*, but is {bad}"
        with pytest.raises(UserError, match=f"^--{said}$"):
            read(plain, f"--{flag}", str(bad))
        values: dict[str, Any] = {name: bad}
        for group in reversed(groups):
            values = {group: values}
        values["data"] = plain["data"] | values.get("data", {})
        with pytest.raises(UserError, match=rf"^{re.escape(str(file))}: {said}$"):
            read(plain | values)


@pytest.mark.parametrize(("config", "name", "kind", "allowed", "optional"), FIELDS)
def test_json_is_held_to_the_same(config: type, name: str, kind: Any, allowed: Range, optional: bool) -> None:
    if typing.get_origin(kind) is tuple:
        return  # no file has one
    for value in VALUES:
        if fits(value, kind, allowed):
            assert checked("file", "key", value, kind) == value
        else:
            with pytest.raises(UserError, match=rf"^file: key is {re.escape(repr(value))}, but must be "):
                checked("file", "key", value, kind)
    if optional:
        assert checked("file", "key", None, kind | None) is None
    assert allowed is not None


def test_what_turns_something_off_is_allowed() -> None:
    TrainConfig(sample_every=0, divergence=0.0, shard=0, warmup=0, ema=0.0, weight_decay=0.0)
    Sampling(temperature=0.0, top_k=0)
