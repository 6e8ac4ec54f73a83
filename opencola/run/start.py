"""From the name of a recipe, and flags over it, to a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opencola.layers.device import device
from opencola.models import build
from opencola.run import recipe as recipes
from opencola.run import run
from opencola.run.flags import RunFlags
from opencola.train.distributed import connected


def train(recipe: str, settings: Sequence[str], options: RunFlags, command: str, stage: str | None = None) -> Path:
    """Train by a recipe file, or one that comes with the package; returns the folder of the run."""
    stages = read(recipe, settings)
    with connected(device()):
        return run.run(stages, command, stage, options.resume, options.overwrite)


def read(recipe: str, settings: Sequence[str]) -> list[tuple[str, Any]]:
    """The stages of a recipe by name, with flags over them."""
    return recipes.read(recipe, settings, build.config_class, build.sampling_class)
