"""torch.compile, block by block, around what it is to leave alone."""

from collections.abc import Iterable

from torch import nn

from opencola.layers import packed, randomness


def compile_blocks(blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Have blocks compiled when they are first called.

    Draws are called, not traced, and so is the attention of packed rows, whose kernels are compiled by themselves:
    traced, it makes a dozen graphs of a block.
    """
    randomness.leave_uncompiled()
    packed.leave_uncompiled()
    for block in blocks:
        block.compile(backend=backend)
