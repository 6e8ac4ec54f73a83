"""A plugin of pytest that has another program call the kernels: `-p elsewhere`, the program in OPENCOLA_ELSEWHERE.

The program is `kernels/driver.c`, for this or another processor, which an emulator may run. Every call takes along all
the memory that its tensors lie in and brings it back. OPENCOLA_EVERY=n keeps every nth test only.
"""

import ctypes
import gc
import os
import shlex
import struct
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from opencola.kernels import library


class Request:
    """What a call needs of this process's memory, as buffers, and the places in them that hold addresses."""

    def __init__(self) -> None:
        self.buffers: list[tuple[int, int]] = []  # address, size
        self.addresses: list[int] = []
        self.kept: list[Any] = []

    def place(self, address: int, size: int) -> int:
        """The number of a buffer."""
        if (address, size) not in self.buffers:
            self.buffers.append((address, size))
        return self.buffers.index((address, size))

    def tensor(self, x: Tensor) -> tuple[int, int]:
        """(buffer, byte in it) of its first number."""
        storage = x.untyped_storage()
        self.kept.append(storage)
        return self.place(storage.data_ptr(), storage.nbytes()), x.data_ptr() - storage.data_ptr()

    def data(self, x: Any) -> tuple[int, int]:
        """(buffer, byte in it) of an array or a structure, whose pointers are into tensors."""
        which = self.place(ctypes.addressof(x), ctypes.sizeof(x))
        known = [y for y in gc.get_objects() if type(y) in library.PLAIN and y.is_cpu] if _pointers(x) else []
        for at, address in _pointers(x):
            for y in known:
                start, size = y.untyped_storage().data_ptr(), y.untyped_storage().nbytes()
                if start <= address < start + size:
                    target, _ = self.tensor(y)
                    self.addresses += [which, at, target, address - start]
                    break
            else:
                raise LookupError(f"no tensor has the memory that {x} points to at {at}")
        return which, 0


def _pointers(x: Any, at: int = 0) -> list[tuple[int, int]]:
    """(byte, address) of all pointers in a structure."""
    found = []
    for name, kind, *_ in getattr(x, "_fields_", ()):
        value, place = getattr(x, name), at + getattr(type(x), name).offset
        if kind is ctypes.c_void_p and value is not None:
            found.append((place, value))
        found += _pointers(value, place)
    return found


class Elsewhere:
    """In the place of the library: its functions by name."""

    def __init__(self, command: str) -> None:
        self.program = subprocess.Popen(shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.calls = 0

    def __getitem__(self, name: str) -> "Function":
        return Function(self, name)

    def call(self, name: str, request: Request, integers: list[tuple[int, int]], floats: list[float]) -> int:
        """Have it done; the result."""
        assert self.program.stdin is not None and self.program.stdout is not None
        self.calls += 1

        def numbers(*several: int) -> bytes:
            return struct.pack(f"<{len(several)}q", *several)

        parts = [numbers(len(name)), name.encode(), numbers(len(request.buffers))]
        for address, size in request.buffers:
            parts += [numbers(size), ctypes.string_at(address, size)]
        parts += [numbers(len(request.addresses) // 4, *request.addresses)]
        parts += [numbers(len(integers), *(x for pair in integers for x in pair))]
        parts += [numbers(len(floats)), struct.pack(f"<{len(floats)}f", *floats)]
        self.program.stdin.write(b"".join(parts))
        self.program.stdin.flush()
        result = self.program.stdout.read(8)
        if len(result) < 8:
            pytest.exit(f"{name}: the program ended with {self.program.wait()}", returncode=1)
        for i, (address, size) in enumerate(request.buffers):
            data = self.program.stdout.read(size)
            if i not in request.addresses[::4]:  # addresses there are none here
                ctypes.memmove(address, data, size)
        return struct.unpack("<q", result)[0]


class Function:
    """A kernel, as ctypes has them."""

    def __init__(self, elsewhere: Elsewhere, name: str) -> None:
        self.elsewhere, self.name = elsewhere, name
        self.argtypes: list[Any] = []
        self.restype: Any = None

    def __call__(self, *arguments: Any) -> int | None:
        """Call it."""
        request, integers, floats = Request(), [], []
        for kind, value in zip(self.argtypes, arguments, strict=True):
            if kind is ctypes.c_float:
                floats.append(value)
            elif value is None:
                integers.append((-1, 0))
            elif kind is ctypes.c_long:
                integers.append((-1, int(value)))
            elif isinstance(value, Tensor):
                integers.append(request.tensor(value))
            else:
                integers.append(request.data(getattr(value, "_obj", value)))
        result = self.elsewhere.call(self.name, request, integers, floats)
        return result if self.restype else None


elsewhere = Elsewhere(os.environ["OPENCOLA_ELSEWHERE"])
library.library = lambda: elsewhere  # type: ignore[assignment, return-value]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Emulated, all of them take minutes."""
    items[:] = items[:: int(os.environ.get("OPENCOLA_EVERY", "1"))]


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish() -> Iterator[None]:
    """End the program, and say how often it was asked."""
    assert elsewhere.program.stdin is not None
    elsewhere.program.stdin.close()
    print(f"\n{elsewhere.calls} calls elsewhere, which ended with {elsewhere.program.wait()}")
    return (yield)


torch.set_num_threads(1)
