"""Random draws that depend on what they are for, never on batch order, rank or what was drawn before."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(seed: int, purpose: str, *keys: int) -> torch.Generator:
    """CPU generator determined by (seed, purpose, keys), such as (seed, "noise", sample id, block)."""
    digest = hashlib.blake2b(repr((seed, purpose, *keys)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def below(number: int, seed: int, purpose: str, *keys: int) -> int:
    """One of 0 .. number - 1, far fewer than 2^63, determined by (seed, purpose, keys)."""
    return generator(seed, purpose, *keys).initial_seed() % number


def normal(shape: Sequence[int], seed: int, purpose: str, ids: Tensor, *keys: int) -> Tensor:
    """Standard normal float32 (len(ids), *shape) on the CPU; row i depends only on (seed, purpose, ids[i], keys)."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(seed, purpose, i, *keys)) for i in ids.tolist()])


def uniform(shape: Sequence[int], seed: int, purpose: str, ids: Tensor, *keys: int) -> Tensor:
    """Uniform [0, 1) float32 (len(ids), *shape) on the CPU; row i depends only on (seed, purpose, ids[i], keys)."""
    return torch.stack([torch.rand(tuple(shape), generator=generator(seed, purpose, i, *keys)) for i in ids.tolist()])


def leave_uncompiled() -> None:
    """Have torch.compile call the draws instead of tracing them anew for every id.

    Not a decorator, because that would load the compiler, four seconds of it, into every process.
    """
    global normal, uniform
    normal, uniform = torch.compiler.disable(normal), torch.compiler.disable(uniform)
