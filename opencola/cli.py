"""The command `opencola`: what it offers, and how it fails: one line on stderr and exit code 2.

The other commands are in `commands`. Each loads what it needs when it runs, so that help comes at once.
"""

import difflib
import io
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from opencola import __version__, commands, flags
from opencola.commands import help_of

USAGE = """usage: opencola COMMAND [FLAGS]

Continuous latent diffusion language models: train them, and let them write.

commands:
{commands}
  opencola COMMAND --help      its flags, with examples
  opencola --version           print the version

examples:
  opencola generate --prompt "Once upon a time"
  opencola demo
  opencola train text --data.source my.txt
"""


@dataclass(frozen=True)
class RunFlags:
    """What to do about a run that is already there."""

    resume: bool = False
    """Go on where the run stopped; stages that are finished stay as they are."""
    overwrite: bool = False
    """Delete the run that is there, and start anew."""


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
    devices: int = 1
    """GPUs to plan for (--dry-run)."""
    gpu: str | None = None
    """Kind of GPU to plan for, such as H100; all that are known without it (--dry-run)."""
    utilisation: float = 0.4
    """Share of the GPU's peak rate that training is taken to reach (--dry-run)."""


def train(argv: Sequence[str]) -> None:
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
    recipe = next(iter(argv), "-")
    if {"-h", "--help"} & {*argv} and not recipe.startswith("-"):
        train_recipe(recipe, ["--help"], TrainFlags(recipe=recipe), "")
    options, settings = flags.parse(
        TrainFlags, argv, prog="opencola train", description=help_of(train), return_unknown_args=True
    )
    if options.dry_run:
        from opencola import dry_run

        stages = read(options.recipe, settings)
        return dry_run.dry_run(stages, options.stage, options.devices, options.gpu, options.utilisation)
    train_recipe(options.recipe, settings, options, shlex.join(["opencola", "train", *argv]), options.stage)


def train_recipe(
    recipe: str, settings: Sequence[str], options: RunFlags, command: str, stage: str | None = None
) -> Path:
    """Train by a recipe file, or one that comes with the package; returns the folder of the run."""
    from opencola import run
    from opencola.models import build
    from opencola.train.distributed import connected

    stages = read(recipe, settings)
    with connected(build.device()):
        return run.run(stages, command, stage, options.resume, options.overwrite)


def read(recipe: str, settings: Sequence[str]) -> list[tuple[str, Any]]:
    """The stages of a recipe by name, with flags over them."""
    from opencola import recipe as recipes
    from opencola.models import build

    return recipes.read(recipe, settings, build.config_class)


def demo(argv: Sequence[str]) -> None:
    """Train a tiny model on generated stories, in minutes, and measure what it writes.

    Runs the recipe `demo` and then writes report.html and metrics.json beside the model. Whatever the recipe sets can
    be set here, too, as --KEY VALUE; `opencola train demo --help` lists it all.

    examples:
      opencola demo
      opencola demo --out runs/other --seed 1
      opencola demo --resume
    """
    started = time.time()
    options, settings = flags.parse(
        RunFlags, argv, prog="opencola demo", description=help_of(demo), return_unknown_args=True
    )
    out = train_recipe("demo", settings, options, shlex.join(["opencola", "demo", *argv]))
    from opencola.demo import finish

    finish(out, started=None if options.resume else started)


OFFERED = (
    commands.generate,
    commands.chat,
    demo,
    train,
    commands.tokenize,
    commands.score,
    commands.lm_eval,
    commands.evaluate,
    commands.latents,
    commands.inspect,
    commands.report,
    commands.quality,
    commands.diagnose,
    commands.export,
)
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {function.__name__: function for function in OFFERED}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 2 after a mistake of the user's, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack a letter that a model writes
    try:
        return dispatch(argv)
    except KeyboardInterrupt as interrupt:
        print(f"\n{str(interrupt) or 'interrupted'}", file=sys.stderr)
        if argv[:1] in (["train"], ["demo"]):
            again = [word for word in argv if word not in ("--overwrite", "--resume")]
            print(f"go on: opencola {shlex.join(again)} --resume", file=sys.stderr)
        if argv[:1] in (["tokenize"], ["evaluate"]):
            again = [word for word in argv if word != "--overwrite"]
            print(f"go on: opencola {shlex.join(again)}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has gone, as in `opencola generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, ValueError, FloatingPointError) as error:
        if isinstance(error, ValueError) and not is_ours(error):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def dispatch(argv: Sequence[str]) -> int:
    """Run the command that the first word names."""
    match argv:
        case ["--version" | "-V"]:
            print(f"opencola {__version__}")
        case [] | ["--help" | "-h" | "help"]:
            lines = (f"  {name:<10} {help_of(function).splitlines()[0]}" for name, function in COMMANDS.items())
            print(USAGE.format(commands="\n".join(lines)))
        case [name, *rest] if name in COMMANDS:
            COMMANDS[name](rest)
        case [name, *_]:
            near = difflib.get_close_matches(name, COMMANDS, 1)
            advice = f"did you mean {near[0]}?" if near else f"the commands are: {', '.join(COMMANDS)}"
            raise ValueError(f"there is no command {name!r}; {advice}")
    return 0


def is_ours(error: Exception) -> bool:
    """Whether an error was raised by this package: then its message is meant for users."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).is_relative_to(Path(__file__).parent)
