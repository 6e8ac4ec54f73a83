"""What the engine is asked for, and what it gives: requests, and the pieces of their texts in streams."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from opencola.errors import UserError
from opencola.models.constraint import Constraint
from opencola.models.sampling import Sampling
from opencola.models.stopping import Finished, State
from opencola.ranges import Count, check


@dataclass(frozen=True)
class Limits:
    """How much the engine takes on."""

    max_batch: Count = 16
    """Number of texts written at a time."""
    max_waiting: Count = 64
    """Number of texts that may wait; further ones are refused."""
    cache_mib: Count = 4096
    """MiB for the caches of the texts that are being written."""

    def __post_init__(self) -> None:
        check(self)


class QueueFullError(UserError):
    """As many texts wait as may: try again later."""


class StoppingError(UserError):
    """The engine is being closed."""


class TooLargeError(UserError):
    """What was asked for could never be written within the limits."""


@dataclass(frozen=True)
class Request:
    """A text to be written."""

    prompt: Sequence[int]
    """Token ids."""
    sampling: Sampling
    end_ids: Sequence[int] = ()
    """Tokens that end the text."""
    sample: int = 0
    """With the seed of the sampling it decides the draws, as in `opencola generate` the place of a prompt."""
    watch: bool = False
    """Whether to tell the states that blocks go through."""
    logprobs: int | None = None
    """Number of most probable tokens to tell in each place, beside the one that is written; None: nothing of that."""
    prompt_logprobs: bool = False
    """The same of the prompt's tokens."""
    constraint: Constraint | None = None
    """What the text is held to."""


@dataclass(frozen=True)
class Scored:
    """How probable a token is, given what stands before it, at temperature 1 (in nats)."""

    token: int
    logprob: float
    best: list[tuple[int, float]]
    """The most probable tokens there, with their log-probabilities."""


@dataclass(frozen=True)
class Piece:
    """What a block adds to a text."""

    text: str
    """Possibly none: characters that are cut, and text that may become a stop string, wait for the next."""
    tokens: list[int]
    finished: Finished
    """Why the text ended, when this is its last piece."""
    states: Sequence[State] = ()
    scores: Sequence[Scored] = ()
    """Of `tokens`."""
    prompt_scores: Sequence[Scored] = ()
    """Of the prompt's tokens, with the first piece."""
    forced: int = 0
    """Number of tokens so far that the constraint has put in the place of others."""


@dataclass
class Stream:
    """The pieces of one text, for one asyncio task."""

    request: Request
    loop: asyncio.AbstractEventLoop
    pieces: "asyncio.Queue[Piece | BaseException]" = field(default_factory=asyncio.Queue)
    cancelled: bool = False

    def cancel(self) -> None:
        """Have the engine drop the text at the next border of blocks. May be called at any time, from any thread."""
        self.cancelled = True

    def put(self, piece: Piece | BaseException) -> None:
        """For the engine's thread."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Every piece as it is there; raises what went wrong with this text."""
        while True:
            piece = await self.pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            yield piece
            if piece.finished:
                return
