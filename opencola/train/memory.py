"""Memory that was freed stays the process's own: the same tensors come again at every step of training."""

import contextlib
import ctypes
import os

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
MOST = (1 << 31) - 1  # an int's
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD")


def keep_freed() -> None:
    """Have glibc give no memory back to the system from now on, unless the environment says how it is to allocate.

    Otherwise every large tensor of every step is mapped anew, and the system clears its pages one by one. Where there
    is no glibc, nothing happens.
    """
    if any(os.environ.get(name) for name in VARIABLES):
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - only glibc has it
        libc.mallopt(TRIM_THRESHOLD, MOST)
        libc.mallopt(MMAP_THRESHOLD, MOST)
