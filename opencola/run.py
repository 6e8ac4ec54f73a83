"""Running a recipe: stage by stage, from the tokenizer and the starting weights to an exported model.

A stage's folder holds recipe.yaml, metrics.jsonl, valid.json (with `valid`), checkpoints/ and, when it is finished, the
model in the release's layout with its tokenizer. The last stage's model is copied to the folder of the whole run.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opencola import recipe as recipes
from opencola.interop import official
from opencola.models import build
from opencola.models.build import Model, ModelConfig
from opencola.recipe import Recipe
from opencola.text.corpus import Corpus
from opencola.text.sources import documents
from opencola.text.tokenizer import FILE_NAME, Tokenizer
from opencola.train.loop import train
from opencola.train.tracker import Means

RECIPE, METRICS, VALID, CHECKPOINTS = "recipe.yaml", "metrics.jsonl", "valid.json", "checkpoints"
VALID_BATCHES = 50
SEPARATE: dict[str, Any] = {"vae": official.VAE_FOLDER, "dit": official.DIT_FOLDER}
LOAD: dict[str, Any] = {"vae": official.load_vae, "dit": official.load_dit}
SAVE: dict[str, Any] = {"vae": official.save_vae, "dit": official.save_dit}
# A stage may change these of the Text VAE that it starts from: no weight was made for one value of theirs.
FREE = ("latent_shift", "latent_scale", "fixed_logsnr")

Stages = list[tuple[str, Recipe[Any]]]


def run(stages: Stages, only: str | None = None, resume: bool = False, overwrite: bool = False) -> Path:
    """Train the stages of a recipe in order, or `only` one of them; returns the folder of the whole run.

    resume: leave finished stages as they are (exported, by an unchanged recipe) and go on from the last checkpoint of
    the next one; overwrite: start anew. Raises FileExistsError when there is a run and neither is asked for, ValueError
    and FileNotFoundError for settings and files that do not go together, KeyboardInterrupt after Ctrl-C.
    """
    names = [name for name, _ in stages]
    if only is not None and only not in names:
        raise ValueError(f"there is no stage {only!r}; the stages are: {', '.join(names)}")
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    last = stages[-1][1].out
    root = last if len(stages) == 1 else last.parent
    check_starts(stages)
    chosen = [(name, recipe) for name, recipe in stages if only in (None, name)]
    for _, recipe in chosen:
        if (recipe.out / RECIPE).exists() and not resume and not overwrite:
            raise FileExistsError(
                f"{recipe.out} holds a run: go on with it (--resume), replace it (--overwrite) or choose another --out"
            )
    ahead = [(name, recipe) for name, recipe in chosen if overwrite or not is_finished(recipe)]
    check_followers(stages, [recipe.out for _, recipe in ahead], [recipe.out for _, recipe in chosen] if overwrite else [])
    for name, recipe in chosen:
        where = f"[{names.index(name) + 1}/{len(names)}] {name}"
        if (name, recipe) not in ahead:
            print(f"{where}: finished before, in {recipe.out}")
            continue
        trained = Stage(recipe, resume)
        if overwrite:
            for _, old in ahead[ahead.index((name, recipe)) :]:
                clear(old.out)
        if root != recipe.out:
            clear_export(root)
        trained.run(where)
    if root != last and holds(last):
        export(last, root)
    return root
