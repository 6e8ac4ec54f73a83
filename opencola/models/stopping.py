"""When a text ends, and which of a block's tokens are given out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from opencola.models.constraint import Constraint

StopRule = Callable[[int, list[int]], int | None]
Finished = Literal["", "eos", "stop", "length"]


@dataclass(frozen=True)
class State:
    """What a block is on its way from noise to text, at one state of the solver."""

    time: float
    """From 1, noise, to 0, data."""
    tokens: list[int]
    """The most probable ones, as the decoder reads the state."""
    margins: list[float]
    """Of each token its probability less that of the second best."""
    latents: Tensor
    """(S, d)."""


@dataclass(frozen=True)
class TokenBlock:
    """New tokens of one sample, and why it ended when these are its last."""

    sample: int
    tokens: list[int]
    finished: Finished
    states: Sequence[State] = ()
    """Those that the block went through, where the text is watched and its family has such."""


def unfinished(blocks: Sequence[TokenBlock]) -> list[int]:
    """Places among the blocks of samples that go on."""
    return [row for row, block in enumerate(blocks) if not block.finished]


@dataclass
class Text:
    """A text as it is written.

    It ends on its own: at its end-of-text token, its stop rule, or exactly its budget of new tokens.
    """

    prompt: list[int]
    sampling: Any
    """Settings of generation, of the family's own class (`build.sampling_class`)."""
    sample: int = 0
    """What its blocks are marked with."""
    id: int = 0
    """Decides its draws, with the seed of its settings."""
    eos_ids: Sequence[int] = ()
    """Tokens that end it, and are not given out."""
    stop: StopRule = lambda sample, tokens: None
    """(sample, new tokens) -> how many of these to keep, or None to go on."""
    watched: bool = False
    """Whether to note the states of its blocks."""
    constraint: Constraint | None = None
    """What it is held to (families that write from left to right); its end is among its tokens then."""
    new: list[int] = field(default_factory=list)
    """Tokens written so far."""
    blocks: int = 0
    """Blocks written so far."""
    forced: int = 0
    """Tokens that the constraint has put in the place of others."""

    @property
    def tokens(self) -> list[int]:
        """All of them, the prompt's first."""
        return self.prompt + self.new

    @property
    def room(self) -> int:
        """Number of tokens that it may still have."""
        return int(self.sampling.max_new_tokens) - len(self.new)

    def take(self, block: list[int], states: Sequence[State] = ()) -> TokenBlock:
        """Go on with a block of new tokens: what of it to give out; the end-of-text token is not among that."""
        before = len(self.new)
        finished: Finished = ""
        block = block[: self.room]
        if len(block) == self.room:
            finished = "length"
        ends = () if self.sampling.ignore_eos else self.eos_ids
        end = next((place for place, token in enumerate(block) if token in ends), None)
        if end is not None:
            block, finished = block[:end], "eos"
        self.new, self.blocks = self.new + block, self.blocks + 1
        keep = self.stop(self.sample, self.new)
        if keep is not None:
            block, finished = block[: max(0, keep - before)], "stop"
        return TokenBlock(self.sample, block, finished, states)
