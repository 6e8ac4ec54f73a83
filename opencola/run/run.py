"""Running a recipe, stage by stage.

A stage's folder holds recipe.yaml, metrics.jsonl, checkpoints/, samples.jsonl (with `train.sample_every`), valid.json
(where the recipe has `valid`) and, once the stage is finished, its model in the public layout with a card. The last
stage's model is copied to the folder of the whole run.
"""

import json
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from opencola.checkpoints import card, parts
from opencola.checkpoints.parts import PARTS
from opencola.checkpoints.settings import EXTRAS, without_others
from opencola.errors import UserError
from opencola.models import build
from opencola.run import checks
from opencola.run import recipe as recipes
from opencola.run.export import METRICS, RECIPE, VALID, export
from opencola.run.recipe import Recipe
from opencola.run.stage import num_trained, prepare
from opencola.text.lines import last_object
from opencola.text.tokenizer import FILE_NAME
from opencola.train import distributed, sinks

CHECKPOINTS = "checkpoints"
WRITTEN = (RECIPE, METRICS, "samples.jsonl", VALID, CHECKPOINTS, "tensorboard", "wandb", FILE_NAME, EXTRAS)


def run(
    stages: Sequence[tuple[str, Recipe[Any, Any]]],
    command: str,
    only: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Train a recipe's stages in order, or `only` one of them; returns the folder of the whole run.

    command: how the user asked for it, for the model's card; resume: pass over finished stages (exported, and their
    recipe unchanged) and go on from the last checkpoint of the others; overwrite: start anew. Raises FileExistsError
    where there is a run and neither is asked for, UserError and FileNotFoundError for settings and files that do not
    fit each other, KeyboardInterrupt after Ctrl-C.
    """
    last = stages[-1][1].out
    root = last if len(stages) == 1 else last.parent
    ahead = plan(stages, only, resume, overwrite)
    if parts.has_model(root) and not resume and not overwrite:
        raise FileExistsError(f"{root} holds a model: choose another --out, or replace it with --overwrite")
    for number, (name, recipe) in enumerate(stages, 1):
        title = f"[{number}/{len(stages)}] {name}"
        if only not in (None, name):
            continue
        if recipe not in ahead:
            say(f"{title}: finished before, in {recipe.out}")
            continue
        stage = prepare(recipe, resume)
        for warning in stage.warnings():
            say(f"{title}: {warning}")
        distributed.barrier()  # all have looked at what is there
        if distributed.is_main():
            if overwrite:  # only now, when all that the stage needs has been found
                for other in ahead[ahead.index(recipe) :]:
                    clear(other.out, *WRITTEN)
            for folder in (root, recipe.out):
                clear(folder, *parts.FOLDERS, EXTRAS, VALID, card.FACTS, card.EVALUATION)
        distributed.barrier()
        say(f"{title}: {recipe.train.steps} steps, {num_trained(stage.model) / 1e6:.2f} M parameters to train")
        stage.train(resume, command)
        say(f"{title}: {summary(recipe.out)}; in {recipe.out}")
    if root != last and parts.has_model(last) and distributed.is_main():
        export(last, root)
    distributed.barrier()
    if parts.has_whole_model(root):
        say(f"The model is in {root}. Let it write: opencola generate --model {shlex.quote(str(root))} --prompt TEXT")
    return root


def plan(
    stages: Sequence[tuple[str, Recipe[Any, Any]]], only: str | None, resume: bool, overwrite: bool
) -> list[Recipe[Any, Any]]:
    """The stages to train; errors that can be told before anything is done are raised here."""
    if only is not None and only not in dict(stages):
        raise UserError(f"there is no stage {only!r}; the stages are: {', '.join(dict(stages))}")
    if resume and overwrite:
        raise UserError("choose one of --resume and --overwrite")
    ahead: list[Recipe[Any, Any]] = []
    for number, (name, recipe) in enumerate(stages):
        check_start(name, recipe, [earlier for _, earlier in stages[:number]])
        chosen = only in (None, name)
        begun = (recipe.out / RECIPE).exists()
        if begun and any(recipe.init == changed.out for changed in ahead) and not (chosen and overwrite):
            raise UserError(f"{recipe.out} started from {recipe.init}, which would change: use --overwrite")
        if begun and chosen and not resume and not overwrite:
            raise FileExistsError(
                f"{recipe.out} holds a run: go on with --resume, replace it with --overwrite, or choose another --out"
            )
        if chosen and not (resume and is_finished(recipe)):
            sinks.check(recipe.train.trackers)
            checks.check(name, recipe, distributed.num_processes())
            ahead.append(recipe)
    return ahead


def check_start(name: str, recipe: Recipe[Any, Any], earlier: Sequence[Recipe[Any, Any]]) -> None:
    """Raise UserError where a stage lacks the weights that it needs, or those that it is to start from are another
    family's or sized otherwise."""
    stages = [other for other in earlier if recipe.init == other.out]
    for other in stages:
        if not build.starting_parts(recipe.model).keys() & build.part_names(other.model):
            titles = [PARTS[part].title for part in build.part_names(other.model)]
            raise UserError(f"stage {name}: {parts.other_family(recipe.model, other.out, titles)}")
    if recipe.init is not None and not stages and parts.has_model(recipe.init):
        parts.starting(recipe.model, recipe.init)
    for part, needed in build.starting_parts(recipe.model).items():
        if needed and recipe.init is None:
            title = PARTS[part].title
            raise UserError(f"stage {name} needs a trained {title}: set init to an earlier stage or a model's folder")
        for other in stages:
            if part in build.starting_parts(other.model):
                config, found = (PARTS[part].config(model) for model in (recipe.model, other.model))
                PARTS[part].check_same(config, found, f"stage {other.out.name}")


def say(text: str) -> None:
    """Print a line, on one of the processes."""
    if distributed.is_main():
        print(text, flush=True)


def is_finished(recipe: Recipe[Any, Any]) -> bool:
    """Whether a stage was trained to its end by this very recipe."""
    if not (recipe.out / EXTRAS).exists():  # written last
        return False
    before = yaml.safe_load((recipe.out / RECIPE).read_text(encoding="utf-8"))
    now, before = recipes.values(recipe), recipes.up_to_date(before)
    before["sampling"] = without_others(before["sampling"], now["sampling"])
    return movable(now) == movable(before)


def movable(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values without what changes when the run is moved to another folder."""
    start = values["init"] and os.path.relpath(values["init"], values["out"])
    return {name: value for name, value in values.items() if name != "out"} | {"init": start}


def summary(out: Path) -> str:
    """How a stage ended, in one line."""
    record = last_object(out / METRICS)
    names = ("loss", "reconstruction_accuracy", "vae_logsnr")
    figures = [(name.replace("_", " "), record[name]) for name in names if name in record]
    if (out / VALID).exists():
        figures.append(("validation loss", json.loads((out / VALID).read_text())["loss"]))
    took = f"{record['seconds']:.0f} s" if record["seconds"] < 120 else f"{record['seconds'] / 60:.1f} min"
    named = ", ".join(f"{name} {value:.4g}" for name, value in figures if value is not None)
    return f"{record['step']} steps in {took}, {named}"


def clear(folder: Path, *names: str) -> None:
    """Delete what a run wrote into a folder under these names, and nothing else."""
    for place in (folder / name for name in names):
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
