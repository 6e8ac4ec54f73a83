"""What the list of models tells of a model beside its name: its family, and the settings that requests may name."""

import ast
import inspect
import math
import textwrap
from typing import Annotated, Any, Literal, get_args, get_origin

from opencola.models.sampling import Sampling
from opencola.ranges import Range

NAMES = {"max_new_tokens": "max_tokens"}
LEFT_OUT = {"chat", "seed"}
"""Settings that a path stands for, or that have no default here."""


def about(sampling: Sampling) -> dict[str, Any]:
    """Family, whether the model answers users, and of each setting default, kind, range, choices and what it is."""
    helps = _helps(type(sampling))
    settings = {
        NAMES.get(name, name): _setting(hint, getattr(sampling, name), helps[name])
        for name, hint in sampling.hints().items()
        if name not in LEFT_OUT
    }
    return {"family": sampling.owner.partition(" ")[2], "chat": sampling.chat, "sampling": settings}


def _setting(hint: Any, default: Any, said: str) -> dict[str, Any]:
    kind, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    found: dict[str, Any] = {"default": default, "help": said}
    if get_origin(kind) is Literal:
        return found | {"kind": "choice", "choices": get_args(kind)}
    for note in notes:
        if isinstance(note, Range):
            found |= {"min": note.low} if note.low > -math.inf else {}
            found |= {"max": note.high} if note.high < math.inf else {}
    return found | {"kind": getattr(get_origin(kind) or kind, "__name__", str(kind))}


def _helps(sampling: type[Sampling]) -> dict[str, str]:
    """The settings' docstrings by name, those of base classes among them."""
    found: dict[str, str] = {}
    for each in reversed(sampling.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(body, ast.ClassDef)
        for field, said in zip(body.body, body.body[1:], strict=False):
            match field, said:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found
