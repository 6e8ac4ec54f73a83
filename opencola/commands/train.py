"""Train a model by a recipe.

Whatever the recipe sets can be set here, too, as --KEY VALUE; `opencola train RECIPE --help` lists it all.
After Ctrl-C or a crash, the same command with --resume goes on from the last checkpoint.

examples:
  opencola train demo --out runs/mine --train.steps 500
  opencola train text --data.source my.txt --out runs/mine
  opencola train text --data.source my.txt --out runs/mine --resume
  opencola train my-recipe.yaml --stage prior --overwrite
  opencola train paper --dry-run --devices 8
"""

import contextlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated

import tyro

from opencola.errors import UserError
from opencola.ranges import Count, Range, check
from opencola.run import flags
from opencola.run.flags import RunFlags


@dataclass(frozen=True, kw_only=True)
class TrainFlags(RunFlags):
    """What to train."""

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """Recipe file, or the name of a recipe that comes with the package: demo, text, tinystories, fairytales, sft,
    ar, llada, plaid, paper, ladder/1m to ladder/1800m."""
    stage: str | None = None
    """Train only this stage of the recipe."""
    dry_run: bool = False
    """Train nothing: print parameters, operations, memory, time on GPUs, and the plan. Takes seconds and no GPU."""
    devices: Count = 1
    """Number of GPUs to plan for (--dry-run); at least 1."""
    gpu: str | None = None
    """Kind of GPU to plan for, such as H100; all that are known without it (--dry-run)."""
    json: bool = False
    """Print estimates as JSON, an object in a line for each stage, in place of tables (--dry-run)."""
    utilisation: Annotated[float, Range(0, 1, above=True)] = 0.4
    """Share of the GPU's peak rate that training is taken to reach, above 0 and at most 1 (--dry-run)."""

    def __post_init__(self) -> None:
        check(self)


def command(argv: Sequence[str]) -> None:
    """Run `opencola train`."""
    words = recipe_first(argv)
    if {"-h", "--help"} & {*words} and not words[0].startswith("-"):
        from opencola.run import start

        start.read(words[0], ["--help"])
    options, settings = flags.parse(
        TrainFlags, words, prog="opencola train", description=__doc__, return_unknown_args=True
    )
    from opencola.run import dry_run, start  # loads torch: not for the help text

    if options.dry_run:
        stages = start.read(options.recipe, settings)
        return dry_run.dry_run(stages, options.stage, options.devices, options.gpu, options.utilisation, options.json)
    start.train(options.recipe, settings, options, shlex.join(["opencola", "train", *argv]), options.stage)


def recipe_first(argv: Sequence[str]) -> Sequence[str]:
    """A command line with its recipe in front, which may stand behind flags.

    It is the first word that names a recipe, of those that are neither flags nor the value of one. Which flags there
    are depends on it, but all that are not these take a value at least. Raises UserError where there is no such word.
    """
    if argv and not argv[0].startswith("-"):
        return argv
    switches = {"help", "h", *(field.name for field in fields(TrainFlags) if field.default is False)}

    def takes_value(word: str) -> bool:
        name = word.lstrip("-").removeprefix("no-").replace("-", "_")
        return word.startswith("--") and word != "--" and "=" not in word and name not in switches

    free = [
        place
        for place, word in enumerate(argv)
        if not word.startswith("-") and not (place and takes_value(argv[place - 1]))
    ]
    if not free:
        if {"-h", "--help"} & {*argv}:
            return argv
        raise UserError("missing: RECIPE")
    from opencola.run import recipe as recipes  # loads torch

    chosen = free[0]
    for place in reversed(free):
        with contextlib.suppress(FileNotFoundError):
            recipes.find(argv[place])
            chosen = place
    return [argv[chosen], *argv[:chosen], *argv[chosen + 1 :]]
