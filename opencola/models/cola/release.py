"""What the public release does otherwise: its stopping and its noise (official-format §5, §9)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from opencola.models.cola.prompts import Prompts
from opencola.models.stopping import Finished, Text, TokenBlock


class ReleaseStop:
    """The release's rule (official-format §5, Q11): all samples end together, tokens known from the prompt count.

    chunk: tokens of a block.
    """

    def __init__(self, prompts: Prompts, texts: Sequence[Text], chunk: int) -> None:
        self.known, self.chunk = prompts.known, chunk
        self.ended = [False] * len(texts)

    def take(self, texts: Sequence[Text], blocks: Sequence[list[int]]) -> list[TokenBlock]:
        """Go on with a block of tokens each: of it everything but the prompt's own is given out."""
        number = texts[0].blocks
        for row, (text, block) in enumerate(zip(texts, blocks, strict=True)):
            self.ended[row] |= not set(text.eos_ids).isdisjoint(block)
            text.new, text.blocks = text.new + block, number + 1
        finished: Finished = ""
        if (number + 1) * self.chunk >= texts[0].sampling.max_new_tokens:
            finished = "length"
        elif all(self.ended):
            finished = "eos"
        start = [len(known) if number == 0 else 0 for known in self.known]
        rows = zip(texts, blocks, start, strict=True)
        return [TokenBlock(text.sample, block[first:], finished) for text, block, first in rows]


def noise(seed: int, ids: Sequence[int], block: int, shape: tuple[int, ...]) -> Tensor:
    """Noise (len(ids), *shape) of a block, seeded as the release seeds it (official-format §9)."""
    seeds = [seed + 1000 * i + 10_000_000 * block for i in ids]
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
