"""The engine: requests wait, are written together, and leave, whoever else is there (docs/guide/serving.md)."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from opencola.errors import UserError
from opencola.models.language_model import LanguageModel
from opencola.models.sampling import Sampling
from opencola.models.stopping import Finished
from opencola.models.text_stream import Continuation
from opencola.ranges import Count, check
from opencola.text.tokenizer import Tokenizer


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


@dataclass(frozen=True)
class Piece:
    """What a block adds to a text."""

    text: str
    """Possibly none: characters that are cut, and text that may become a stop string, wait for the next."""
    tokens: list[int]
    finished: Finished
    """Why the text ended, when this is its last piece."""


@dataclass
class Stream:
    """The pieces of one text, for one asyncio task; closed by `cancel`, after which the engine drops the text."""

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


class Engine:
    """Writes texts with one model, in a thread of its own."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, limits: Limits | None = None) -> None:
        self.model, self.tokenizer, self.limits = model, tokenizer, limits or Limits()
        self.waiting: deque[Stream] = deque()
        self.running: list[Stream] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, *requests: Request) -> list[Stream]:
        """Take texts on, all of them or none. To be called in the asyncio loop that reads the streams.

        Raises TooLargeError, QueueFullError or StoppingError.
        """
        for request in requests:
            self.check(request)
        streams = [Stream(request, asyncio.get_running_loop()) for request in requests]
        with self._changed:
            if self._closing:
                raise StoppingError("the server is stopping")
            if len(self.waiting) + len(streams) > self.limits.max_waiting:
                raise QueueFullError(f"{len(self.waiting)} texts wait already, of at most {self.limits.max_waiting}")
            self.waiting += streams
            self._changed.notify_all()
        return streams

    def check(self, request: Request) -> None:
        """Raise TooLargeError for what could never be written."""

    def close(self, timeout: float | None = None) -> None:
        """Refuse what waits, write to their ends the texts that are begun, and return."""
        with self._changed:
            self._closing = True
            while self.waiting:
                self.waiting.popleft().put(StoppingError("the server is stopping"))
            self._changed.notify_all()
        self._thread.join(timeout)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.waiting or self._closing)
                if not self.waiting:
                    return
                stream = self.waiting.popleft()
                self.running = [stream]
            if not stream.cancelled:
                try:
                    self._write(stream)
                except Exception as error:
                    stream.put(error)
            self.running = []

    def _write(self, stream: Stream) -> None:
        request = stream.request
        text = Continuation(self.tokenizer, list(request.prompt), request.sampling.stop)
        blocks = self.model.generate(
            [request.prompt],
            request.sampling,
            eos_ids=request.end_ids,
            ids=[request.sample],
            stop=lambda sample, tokens: text.stop(tokens),
        )
        for (block,) in blocks:
            piece = text.take(block)
            stream.put(Piece(piece.text, piece.tokens, piece.finished))
            if stream.cancelled:
                return
