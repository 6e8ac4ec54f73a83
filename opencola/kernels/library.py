"""Kernels in C: what torch does on a CPU in many passes over memory, in one. Without a C compiler torch does it all.

`python -m opencola.kernels` says whether they are there. They are compiled on first use, for this processor, into the
user's cache folder; OPENCOLA_KERNELS=0 in the environment leaves them out.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")
SOURCES = Path(__file__).parent
PLAIN = (Tensor, torch.nn.Parameter)  # a subclass may have no numbers at all
TYPES = (torch.float32, torch.complex64, torch.int64)
TILE = 16  # of tiles.h: rows that attention takes side by side


class NotCompiled(Exception):
    """There are no kernels; the message says why."""


def compile_library() -> Path:
    """The compiled library, made unless it is there. Raises NotCompiled with the reason."""
    sources = sorted(SOURCES.glob("*.c"))
    compiler = shlex.split(os.environ.get("CC", "cc"))
    parts = [*(path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]"))), repr((compiler, FLAGS)).encode()]
    name = hashlib.sha256(b"\0".join([*parts, _processor()])).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "opencola"
    library = folder / f"kernels-{name}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:  # moved in one step: several processes may start at once
            command = [*compiler, *FLAGS, *map(str, sources), "-o", f"{made}/kernels.so", "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            os.replace(f"{made}/kernels.so", library)
    except subprocess.CalledProcessError as error:
        raise NotCompiled(f"{shlex.join(error.cmd)} failed:\n{error.stderr}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotCompiled(f"{error} (the compiler is named by CC, the folder by XDG_CACHE_HOME)") from error
    return library


def _processor() -> bytes:
    """What -march=native depends on, for cache folders that several machines share."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return b"".join(sorted({line for line in lines if line.startswith((b"model", b"flags", b"CPU", b"Features"))}))
    return repr(platform.uname()).encode()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None where there are none."""
    if os.environ.get("OPENCOLA_KERNELS") == "0":
        return None
    with contextlib.suppress(NotCompiled, OSError):
        return ctypes.CDLL(str(compile_library()))
    return None


class _Start:
    """Of a tensor's numbers, as an argument."""

    @staticmethod
    def from_param(x: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if x is None else x.data_ptr())


@functools.cache
def function(name: str, arguments: str, result: type | None = None) -> Callable[..., Any]:
    """The kernel of this name; a letter an argument: t tensor or None, p pointer, l long, f float.

    Raises NotCompiled where there are no kernels.
    """
    kernels = library()
    if kernels is None:
        raise NotCompiled("there are no kernels here: the operations of kernels/choice.py do without")
    kernel: Any = kernels[name]
    types = {"t": _Start, "p": ctypes.c_void_p, "l": ctypes.c_long, "f": ctypes.c_float}
    kernel.argtypes, kernel.restype = [types[letter] for letter in arguments.replace(" ", "")], result
    return cast(Callable[..., Any], kernel)


_off = False


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """Within this context torch does it all."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def usable(*tensors: Tensor) -> bool:
    """Whether kernels can take these, on a CPU, outside autocast, torch.compile and forward-mode AD.

    Numbers are float32 or pairs of it, indices int64. Only `choice.py` asks.
    """
    if torch.compiler.is_compiling() or _off or library() is None or torch.is_autocast_enabled("cpu"):
        return False
    if forward_ad._current_level >= 0:  # torch has no public name for it
        return False
    for x in tensors:  # noqa: SIM110 - `all(...)` takes twice as long
        if type(x) not in PLAIN or x.dtype not in TYPES or not x.is_cpu:
            return False
    return True
