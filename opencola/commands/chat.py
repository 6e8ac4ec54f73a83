"""Type beginnings of texts, and read how the model goes on; or talk with a model of conversations.

examples:
  opencola chat
  opencola chat --model runs/sft
  opencola chat --model runs/demo --max-new-tokens 100
"""

import contextlib
import itertools
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import tyro

from opencola.checkpoints.hub import load
from opencola.commands.terminal import ModelFlags, read_flags, show
from opencola.errors import UserError
from opencola.models.language_model import LanguageModel
from opencola.models.sampling import Sampling
from opencola.models.text_stream import generate_text
from opencola.run import flags
from opencola.text.conversations import Message
from opencola.text.lines import check_text
from opencola.text.tokenizer import Tokenizer

HELP = """Type the beginning of a text, and the model goes on from there. Every try has its own noise.
"""
HELP_CHAT = """Say something, and the model answers; it is given all that was said before.
  /new             forget it, and begin a new conversation
"""
HELP_ALWAYS = """  /set KEY VALUE   change a setting, such as /set steps 32
  /set             show the settings
  //TEXT           say /TEXT, which begins with a slash
  /help            show this
  /quit            leave (so do Ctrl-D and Ctrl-C)"""


def command(argv: Sequence[str]) -> None:
    """Run `opencola chat`."""
    options: ModelFlags = read_flags(ModelFlags, argv, prog="opencola chat", description=__doc__)
    model, tokenizer = load(options.model)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 input() then has a history and arrow keys; Windows has no such module
    sampling = options.sampling
    said: list[Message] = []
    print(help_of(sampling))
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        for turn in itertools.count():
            line = input("\n> ")
            try:
                match line.split(maxsplit=1):
                    case []:
                        pass
                    case ["/quit"]:
                        return
                    case ["/help"]:
                        print(help_of(sampling))
                    case ["/new"] if sampling.chat:
                        said = []
                    case ["/set", *change]:
                        sampling = change_setting(sampling, *change)
                    case [command, *_] if command.startswith("/") and not command.startswith("//"):
                        print(f"there is no command {command}; /help shows what there is")
                    case _:
                        check_text(line, "this text")
                        # a text of your own that begins with a slash has one more
                        text = line.replace("//", "/", 1) if line.lstrip().startswith("//") else line
                        said = write(model, tokenizer, said, text, sampling, turn)
            except UserError as error:
                print(f"error: {error}")
    print()


def help_of(sampling: Sampling) -> str:
    """What can be typed."""
    return (HELP_CHAT if sampling.chat else HELP) + HELP_ALWAYS


def write(
    model: LanguageModel, tokenizer: Tokenizer, said: list[Message], line: str, sampling: Sampling, turn: int
) -> list[Message]:
    """Continue a line or, with sampling.chat, answer it; returns the conversation so far, with what was said now."""
    asked = [*said, Message("user", line)]
    if not sampling.chat:
        show(line, bold=True)
    text = ""
    for pieces in generate_text(model, tokenizer, [asked if sampling.chat else line], sampling, [turn]):
        show(pieces[0].text)
        text += pieces[0].text
    print()
    return [*asked, Message("assistant", text)] if sampling.chat else said


def change_setting(sampling: Sampling, change: str = "") -> Sampling:
    """Settings with one of them changed ("KEY VALUE"), or the same ones, shown. Raises UserError."""
    if not change:
        print("\n".join(f"  {name} {value}" for name, value in asdict(sampling).items()))
        return sampling
    key, *values = shlex.split(change)
    if key.replace("-", "_") not in sampling.hints():
        raise sampling.lacks(key)
    options: dict[str, Any] = {"default": sampling, "config": (tyro.conf.FlagConversionOff,)}
    changed: Sampling = flags.parse(type(sampling), [f"--{key}", *map(flags.value, values)], **options)
    return changed
