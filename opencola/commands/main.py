"""The command `opencola`: which commands there are, and how they fail: one line on stderr and exit code 2.

A command is a module of its name beside this one (`-` is `_` there): its docstring is its help, and `command(argv)`
runs it. Only the one that is asked for is loaded, so that help comes at once.
"""

import difflib
import importlib
import io
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from opencola.errors import UserError
from opencola.version import __version__

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
COMMANDS = (
    "generate",
    "chat",
    "serve",
    "demo",
    "train",
    "tokenize",
    "score",
    "lm_eval",
    "evaluate",
    "latents",
    "inspect",
    "report",
    "quality",
    "diagnose",
    "bench-serve",
    "export",
    "kernels",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 1 after a bug, 2 after a mistake, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack a letter that a model writes
    try:
        return dispatch(argv)
    except KeyboardInterrupt as interrupt:
        print(f"\n{line(interrupt) or 'interrupted'}", file=sys.stderr)
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
    except (UserError, OSError) as error:  # files, disks and networks are the user's to mend, too
        print(f"error: {line(error)}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        print(f"this is a bug in OpenCola {__version__}: please report it, with what is above", file=sys.stderr)
        return 1


def line(error: BaseException) -> str:
    """What an error says, with the notes on it, in a line."""
    return " ".join("; ".join([str(error), *getattr(error, "__notes__", ())]).removeprefix("; ").split())


def open_closed_streams() -> None:
    """Give those of stdin, stdout and stderr that whoever started us has closed (`>&-`) the null device."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 open as long as the process lives
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def dispatch(argv: Sequence[str]) -> int:
    """Run the command that the first word names."""
    match argv:
        case ["--version" | "-V"]:
            print(f"opencola {__version__}")
        case [] | ["--help" | "-h" | "help"]:
            print(USAGE.format(commands="\n".join(f"  {name:<11} {summary(name)}" for name in COMMANDS)))
        case [name, *rest] if name in COMMANDS:
            importlib.import_module(f"opencola.commands.{module_of(name)}").command(rest)
        case [name, *_]:
            near = difflib.get_close_matches(name, COMMANDS, 1)
            advice = f"did you mean {near[0]}?" if near else f"the commands are: {', '.join(COMMANDS)}"
            raise UserError(f"there is no command {name!r}; {advice}")
    return 0


def module_of(command: str) -> str:
    """The name of a command's module."""
    return command.replace("-", "_")


def summary(command: str) -> str:
    """What a command does, in a line: the first of its module, which is not loaded."""
    with (Path(__file__).parent / f"{module_of(command)}.py").open(encoding="utf-8") as source:
        return source.readline().strip().strip('"')
