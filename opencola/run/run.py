"""Running a recipe, stage by stage.

A stage's folder holds recipe.yaml, metrics.jsonl, checkpoints/, samples.jsonl (with `train.sample_every`), valid.json
(where the recipe has `valid`) and, once the stage is finished, its model in the public layout with a card. The last
stage's model is copied to the folder of the whole run. Whatever can be refused is refused before anything is written,
and a model stays until another one is whole.
"""

import contextlib
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from opencola.checkpoints import card, parts
from opencola.checkpoints.parts import PARTS
from opencola.errors import UserError
from opencola.models import build
from opencola.run import checks, resuming
from opencola.run.export import METRICS, UNFINISHED, VALID, export
from opencola.run.recipe import Recipe
from opencola.run.stage import invalidate, num_trained, prepare
from opencola.storage import locked
from opencola.text.lines import last_object
from opencola.train import distributed, sinks


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
    with contextlib.suppress(FileExistsError):  # whose run is there may still be told by its lock
        plan(stages, only, resume, overwrite)  # what can be refused at once is refused before any folder is touched
    with ours(root, *(recipe.out for name, recipe in stages if only in (None, name))):
        train(stages, root, command, only, resume, overwrite)
    return root


def train(
    stages: Sequence[tuple[str, Recipe[Any, Any]]],
    root: Path,
    command: str,
    only: str | None,
    resume: bool,
    overwrite: bool,
) -> None:
    """Train the stages as `run` says, in folders that are ours alone."""
    last = stages[-1][1].out
    ahead = plan(stages, only, resume, overwrite)
    begun = any(resuming.is_begun(recipe.out) or (recipe.out / UNFINISHED).exists() for _, recipe in stages)
    if parts.has_model(root) and not (resume and begun) and not overwrite:
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
                for other in ahead[ahead.index(recipe) + 1 :]:  # which start from what is about to change
                    if other.out.exists():
                        invalidate(other.out)
            stage.begin(overwrite)
        distributed.barrier()
        size = f"{num_trained(stage.model) / 1e6:.2f} M parameters to train"
        say(f"{title}: {recipe.train.steps} steps, {size}; {stage.start()}")
        stage.train(command)
        say(f"{title}: {summary(recipe.out)}; in {recipe.out}")
    if (last / UNFINISHED).exists() or not parts.has_model(last):
        return
    if root != last and distributed.is_main() and not is_copy(root, last):
        export(last, root)
    distributed.barrier()
    if parts.has_whole_model(root):
        say(f"The model is in {root}. Let it write: opencola generate --model {shlex.quote(str(root))} --prompt TEXT")


@contextlib.contextmanager
def ours(*folders: Path) -> Iterator[None]:
    """Keep other commands out of folders. Raises UserError, on all processes of this one, naming one that is there."""
    refusal: Exception | None = None
    with contextlib.ExitStack() as stack:
        try:
            for folder in folders if distributed.is_main() else ():
                stack.enter_context(locked(folder))
        except (UserError, OSError) as error:
            refusal = error
        (refusal, *_) = distributed.gather(refusal)
        if refusal is not None:
            raise refusal
        yield


def is_copy(root: Path, last: Path) -> bool:
    """Whether the model of the whole run is that of its last stage."""
    return parts.has_model(root) and card.read_facts(root)["stages"] == card.read_facts(last)["stages"]


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
        begun = resuming.is_begun(recipe.out)
        if begun and any(recipe.init == changed.out for changed in ahead) and not (chosen and overwrite):
            raise UserError(f"{recipe.out} started from {recipe.init}, which would change: use --overwrite")
        if begun and chosen and not resume and not overwrite:
            raise FileExistsError(
                f"{recipe.out} holds a run: go on with --resume, replace it with --overwrite, or choose another --out"
            )
        if chosen and not (resume and resuming.is_finished(recipe)):
            if resume:
                resuming.check_can_go_on(recipe.out)
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
                config, stored = (PARTS[part].config(model) for model in (recipe.model, other.model))
                PARTS[part].check_same(config, stored, f"stage {other.out.name}")


def say(text: str) -> None:
    """Print a line, on one of the processes."""
    if distributed.is_main():
        print(text, flush=True)


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
