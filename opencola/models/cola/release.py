"""What the public release does otherwise: its stopping and its noise (official-format §5, §9)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from opencola.models.cola.prompts import Prompts
from opencola.models.sampling import Sampling
from opencola.models.stopping import Finished, TokenBlock


class ReleaseStop:
    """The release's rule (official-format §5, Q11): all samples end together, tokens known from the prompt count."""

    def __init__(self, prompts: Prompts, sampling: Sampling, eos_ids: Sequence[int], chunk: int) -> None:
        self.known = prompts.known
        self.eos_ids = set(eos_ids)
        self.budget = sampling.max_new_tokens
        self.chunk = chunk  # tokens of a block
        self.ended = [False] * len(prompts.known)

    def cut(self, active: Sequence[int], blocks: Sequence[list[int]], number: int) -> list[TokenBlock]:
        """Tokens to give out of block `number`: everything but the prompt's own."""
        for i, block in zip(active, blocks, strict=True):
            self.ended[i] |= not self.eos_ids.isdisjoint(block)
        finished: Finished = ""
        if (number + 1) * self.chunk >= self.budget:
            finished = "length"
        elif all(self.ended):
            finished = "eos"
        start = [len(self.known[i]) if number == 0 else 0 for i in active]
        return [TokenBlock(i, block[s:], finished) for i, block, s in zip(active, blocks, start, strict=True)]


def noise(seed: int, ids: Sequence[int], block: int, shape: tuple[int, ...]) -> Tensor:
    """Noise (len(ids), *shape) of a block, seeded as the release seeds it (official-format §9)."""
    seeds = [seed + 1000 * i + 10_000_000 * block for i in ids]
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
