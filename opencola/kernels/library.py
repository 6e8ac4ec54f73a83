"""Kernels in C: what torch does on a CPU in many passes over memory, in one. Where there are none, torch does it all.

They are compiled on first use, for this processor, into the user's cache folder or, where that cannot be written to or
loaded from, a temporary one of the user's own. Without a C compiler it is the best of those in the wheel (`build.py`)
that this processor can run. OPENCOLA_KERNELS in the environment says it otherwise: 0 for none, `native` for those
compiled here only, or a variant's name. `opencola kernels` says what came of it.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from opencola.errors import UserError
from opencola.kernels.build import (
    FLAGS,
    NATIVE,
    PREBUILT,
    SOURCES,
    VARIANTS,
    NotCompiled,
    compile_kernels,
    compiler,
    options,
    runnable,
)

PLAIN = (Tensor, torch.nn.Parameter)  # a subclass may have no numbers at all
TYPES = (torch.float32, torch.complex64, torch.int64)
TILE = 16  # of tiles.h: rows that attention takes side by side


class Loaded(NamedTuple):
    """The kernels, their file, and which they are and why these."""

    file: Path
    kernels: ctypes.CDLL
    about: str

    def __str__(self) -> str:
        return f"kernels: {self.file} ({self.about})"


def load() -> Loaded:
    """The library, compiled unless it is there and whole.

    Raises NotCompiled with the reason, and UserError for an OPENCOLA_KERNELS that is none of its values.
    """
    wanted, can = os.environ.get("OPENCOLA_KERNELS") or "1", runnable()
    values = ["0", "1", NATIVE, *(name for names in VARIANTS.values() for name in names)]
    if wanted not in values:
        raise UserError(f"OPENCOLA_KERNELS is {wanted!r} in the environment; it may be {', '.join(values)}")
    if wanted == "0":
        raise NotCompiled("OPENCOLA_KERNELS is 0 in the environment")
    if wanted not in ("1", NATIVE, *can):
        raise NotCompiled(f"OPENCOLA_KERNELS is {wanted}, and this processor can run {', '.join(can) or 'none'}")
    if wanted not in ("1", NATIVE):
        return _prebuilt(wanted, "OPENCOLA_KERNELS names it") or _compiled(wanted)
    try:
        return _compiled(NATIVE)
    except NotCompiled as error:
        others = (_prebuilt(name, str(error)) for name in can) if wanted == "1" else ()
        if best := next(filter(None, others), None):
            return best
        raise


def _prebuilt(variant: str, why: str) -> Loaded | None:
    """The variant of the wheel, if it is there and can be loaded."""
    file = PREBUILT / f"{variant}.so"
    with contextlib.suppress(OSError):
        return Loaded(file, _open(file), f"{variant}, of the wheel: {why}")
    return None


def _compiled(variant: str) -> Loaded:
    reasons = []
    for folder in folders():
        try:
            make_folder(folder)
            file = compile_library(folder, variant)
            return Loaded(file, _open(file), f"{variant}, compiled by {compiler()[0]}")
        except OSError as error:  # no room, no right to write, or a folder that nothing may be loaded from
            reasons.append(f"{folder}: {error}")
    raise NotCompiled(f"{'; '.join(reasons)} (the folder is named by XDG_CACHE_HOME)")


def _open(file: Path) -> ctypes.CDLL:
    """Load a library, whose threads are those of torch's OpenMP or, where torch shows none, of the system's."""
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        if "GOMP_" not in str(error):
            raise
    ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(file))


USER = os.getuid() if hasattr(os, "getuid") else 0


def make_folder(folder: Path) -> None:
    """Make a folder for the library. Raises OSError, for a temporary folder of somebody else's, too."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.parent == Path(tempfile.gettempdir()) and hasattr(os, "getuid") and folder.lstat().st_uid != USER:
        raise PermissionError("it is another user's")


def folders() -> Iterator[Path]:
    """Where the library may be: the user's cache, where there is one, and a temporary folder."""
    cache = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    if cache.parts[0] != "~":  # as it stays where nobody knows the home folder
        yield cache / "opencola"
    yield Path(tempfile.gettempdir()) / f"opencola-{USER}"


def compile_library(folder: Path, variant: str) -> Path:
    """The compiled library in a folder, made unless it is there and whole.

    Its name ends with its checksum, so that no damaged one is ever loaded. Raises NotCompiled, and OSError where the
    folder cannot be written to.
    """
    parts = [path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]"))]
    parts += [repr((compiler(), FLAGS, options(variant))).encode(), processor() if variant == NATIVE else b""]
    name = "kernels-" + hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    for library in sorted(folder.glob(f"{name}-*.so")):
        if library.name == f"{name}-{_checksum(library)}.so":
            return library
        library.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as made:  # moved in one step: several processes may start at once
        file = Path(made, "kernels.so")
        compile_kernels(file, variant)
        library = folder / f"{name}-{_checksum(file)}.so"
        os.replace(file, library)
    return library


def _checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def processor() -> bytes:
    """What -march=native depends on, for cache folders that several machines share."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return b"".join(sorted({line for line in lines if line.startswith((b"model", b"flags", b"CPU", b"Features"))}))
    return repr(platform.uname()).encode()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None where there are none."""
    try:
        kernels = load().kernels
    except NotCompiled:
        return None
    if hasattr(os, "register_at_fork"):
        # A fork has none of the threads that its parent's OpenMP knows of, and would wait for them, in torch's own
        # operations too.
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
    return kernels


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
    """Whether kernels are there and can take these. Only `choice.py` asks."""
    return on_cpu(*tensors) and library() is not None


def on_cpu(*tensors: Tensor) -> bool:
    """Whether these are plain numbers on a CPU, outside autocast, torch.compile and forward-mode AD.

    Numbers are float32 or pairs of it, indices int64. Only `choice.py` asks.
    """
    if torch.compiler.is_compiling() or _off or torch.is_autocast_enabled("cpu"):
        return False
    if forward_ad._current_level >= 0:  # torch has no public name for it
        return False
    for x in tensors:  # noqa: SIM110 - `all(...)` takes twice as long
        if type(x) not in PLAIN or x.dtype not in TYPES or not x.is_cpu:
            return False
    return True
