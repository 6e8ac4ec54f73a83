"""When a sample ends, and which of a block's tokens are given out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from opencola.models.sampling import Sampling

StopRule = Callable[[int, list[int]], int | None]
Finished = Literal["", "eos", "stop", "length"]


@dataclass(frozen=True)
class TokenBlock:
    """New tokens of one sample, and why it ended when these are its last."""

    sample: int
    tokens: list[int]
    finished: Finished


def unfinished(blocks: Sequence[TokenBlock]) -> list[int]:
    """Places among the blocks of samples that go on."""
    return [row for row, block in enumerate(blocks) if not block.finished]


class OwnStop:
    """Every sample ends on its own: at its end-of-text token, its stop rule, or exactly its budget of new tokens.

    known: the tokens of each sample's prompt with which its block 0 begins.
    """

    def __init__(
        self, known: Sequence[Sequence[int]], sampling: Sampling, eos_ids: Sequence[int], stop: StopRule
    ) -> None:
        self.known = known
        self.budget = sampling.max_new_tokens
        self.eos_ids = set() if sampling.ignore_eos else set(eos_ids)
        self.stop = stop
        self.new: list[list[int]] = [[] for _ in known]

    def cut(self, active: Sequence[int], blocks: Sequence[list[int]], number: int) -> list[TokenBlock]:
        """Tokens to give out of block `number` of the active samples; the end-of-text token is not among them."""
        return [
            self._cut(i, block[len(self.known[i]) if number == 0 else 0 :])
            for i, block in zip(active, blocks, strict=True)
        ]

    def _cut(self, sample: int, block: list[int]) -> TokenBlock:
        before = len(self.new[sample])
        finished: Finished = ""
        block = block[: self.budget - before]
        if before + len(block) == self.budget:
            finished = "length"
        end = next((place for place, token in enumerate(block) if token in self.eos_ids), None)
        if end is not None:
            block, finished = block[:end], "eos"
        self.new[sample] += block
        keep = self.stop(sample, self.new[sample])
        if keep is not None:
            block, finished = block[: max(0, keep - before)], "stop"
        return TokenBlock(sample, block, finished)
