"""Whether a recipe divides: sequences into blocks, batches among processes, processes into a mesh.

Asked before anything is loaded or written, so that nothing is lost when the answer is no.
"""

import math
from typing import Any

from opencola.errors import UserError
from opencola.models import build
from opencola.run.recipe import Recipe
from opencola.text.tokenizer import SMALLEST_VOCABULARY


def check(stage: str, recipe: Recipe[Any, Any], processes: int) -> None:
    """Raise UserError, in one line with fields, values and what to do, where a stage does not divide."""
    data, train, own = recipe.data, recipe.train, recipe.tokenizer
    num_shards(stage, recipe, processes)
    for field, value, divisors in (
        ("data.length", data.length, build.length_factors(recipe.model)),
        ("data.batch_size", data.batch_size, {"processes": processes, "train.accumulate": train.accumulate}),
    ):
        step = math.prod(divisors.values())
        if value % step:
            product = " x ".join(f"{name} {divisor}" for name, divisor in divisors.items())
            advice = f"set it to {near(value, step)}"
            raise UserError(f"stage {stage}: {field} {value} is not a multiple of {product}: {advice}")
    smallest = SMALLEST_VOCABULARY + len(own.special)
    if own.path is None and recipe.init is None and own.vocab_size < smallest:
        raise UserError(
            f"stage {stage}: tokenizer.vocab_size {own.vocab_size} is too small for bytes and special tokens: "
            f"set it to {smallest} or more"
        )


def num_shards(stage: str, recipe: Recipe[Any, Any], processes: int) -> int:
    """Processes that share the parameters of one copy; UserError where copies and shards do not use all processes."""
    replicate, shard = recipe.train.replicate, recipe.train.shard
    if processes % replicate:
        raise UserError(
            f"stage {stage}: train.replicate {replicate} does not divide processes {processes}: set it to a divisor"
        )
    if shard and replicate * shard != processes:
        raise UserError(
            f"stage {stage}: train.replicate {replicate} x train.shard {shard} is not processes {processes}: "
            f"set train.shard to {processes // replicate}, or to 0 for all that are left"
        )
    return processes // replicate


def near(value: int, step: int) -> str:
    """The multiples of a step around a value."""
    below = value // step * step
    return " or ".join(str(multiple) for multiple in (below, below + step) if multiple)
