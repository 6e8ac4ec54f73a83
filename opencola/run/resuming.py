"""How far a stage's folder is: finished, under way, to be gone on with; and which settings can still change.

`recipe.yaml` is what training was last begun with, `training.json` tells what the model beside it was trained by. While
these two are not of the same training, there is a file `unfinished`.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from opencola.checkpoints import card, parts
from opencola.checkpoints.settings import EXTRAS, without_others
from opencola.errors import UserError
from opencola.run import recipe as recipes
from opencola.run.export import RECIPE, UNFINISHED
from opencola.run.recipe import Recipe
from opencola.text.tokenizer import FILE_NAME, Tokenizer
from opencola.train.checkpoint import CHECKPOINTS, RUN, latest


def is_begun(out: Path) -> bool:
    """Whether a folder holds a run, however far it is."""
    return (out / RECIPE).exists() or latest(out / CHECKPOINTS) is not None


def is_finished(recipe: Recipe[Any, Any]) -> bool:
    """Whether a stage was trained to its end by this very recipe."""
    out = recipe.out
    if not (out / EXTRAS).exists() or (out / UNFINISHED).exists():
        return False
    stages = card.read_facts(out)["stages"]
    before = stages[-1]["recipe"] if stages else recorded(out)
    if before is None:
        return False
    now, before = recipes.values(recipe), recipes.up_to_date(before)
    before["sampling"] = without_others(before["sampling"], now["sampling"])
    return movable(now) == movable(before)


def recorded(out: Path) -> dict[str, Any] | None:
    """The values of a folder's recipe.yaml, None where there is none. Raises UserError where it is damaged."""
    file = out / RECIPE
    if not file.exists():
        return None
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: start anew with --overwrite")
    return values


def movable(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values without what changes when the run is moved to another folder."""
    start = values["init"] and os.path.relpath(values["init"], values["out"])
    return {name: value for name, value in values.items() if name != "out"} | {"init": start}


def check_can_go_on(out: Path) -> None:
    """Raise UserError where going on would train a model anew: it is there, and no checkpoint of it."""
    if parts.has_model(out) and not (out / UNFINISHED).exists() and latest(out / CHECKPOINTS) is None:
        raise UserError(
            f"{out} holds a trained model, but no checkpoint to go on from: train it anew with --overwrite, or choose "
            "another --out"
        )


def tokenizer_of_run(out: Path) -> Path | None:
    """The tokenizer that a run which has a checkpoint was begun with, if its file is still there."""
    if latest(out / CHECKPOINTS) is None:
        return None
    files = (out / CHECKPOINTS / FILE_NAME, out / FILE_NAME)  # earlier versions had it in the latter from the start
    return next((file for file in files if file.is_file()), None)


def check_settings(recipe: Recipe[Any, Any], tokenizer: Tokenizer, source: Path | None, last: Path) -> None:
    """Raise UserError, naming the setting, where one would have no effect on the run that goes on from `last`.

    tokenizer: that of the recipe; source: where it is from, None where the recipe trains its own.
    """
    file, before = tokenizer_of_run(recipe.out), recorded(recipe.out)
    if source is not None and file is not None and Tokenizer.load(file).fingerprint != tokenizer.fingerprint:
        raise UserError(f"{source} holds another tokenizer than the run in {recipe.out} was begun with")
    if before is not None:
        for setting in without_effect(recipe, before, last, source is None):
            raise UserError(f"{setting} has no effect: go on without it, or train anew with --overwrite")


def without_effect(recipe: Recipe[Any, Any], before: dict[str, Any], last: Path, own_tokenizer: bool) -> Iterator[str]:
    """Settings that a run cannot follow any more, in words; before: those that it was begun with."""
    now, out = recipes.values(recipe), recipe.out
    try:
        done = json.loads((last / RUN).read_text())
        steps, seconds = int(done["step"]), float(done["seconds"])
    except (OSError, ValueError, KeyError):  # damaged: loading it says so
        return
    if recipe.train.steps < steps:
        yield f"train.steps {recipe.train.steps}, as the run in {out} has taken {steps} steps,"
    limit = recipe.train.seconds
    if limit is not None and limit < seconds and limit != before.get("train", {}).get("seconds"):
        yield f"train.seconds {limit:g}, as the run in {out} has taken {seconds:.0f} s,"
    if own_tokenizer:
        for name, value in now["tokenizer"].items():
            if (old := before.get("tokenizer", {}).get(name, value)) != value:
                yield f"tokenizer.{name} {value}, as the run in {out} was begun with {old},"
    begun = before.get("init")
    elsewhere = Path(now["init"] or "").resolve() != Path(begun or "").resolve()
    if elsewhere and movable(now)["init"] != movable({"init": begun, "out": before.get("out", str(out))})["init"]:
        yield f"init {now['init']}, as the run in {out} was begun with {begun},"
