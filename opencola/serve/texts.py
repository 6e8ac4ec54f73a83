"""The texts of one request while the engine writes them."""

import asyncio
import time
from collections.abc import AsyncGenerator

from opencola.errors import UserError
from opencola.serve.errors import SERVER, ApiError, unwritable
from opencola.serve.prompts import Work
from opencola.serve.requests import Piece, QueueFullError, StoppingError, Stream, TooLargeError
from opencola.serve.service import Service

RETRY = {"Retry-After": "1"}


class Texts:
    """The pieces of all texts of a request, as they come; in use no longer than its time allows."""

    def __init__(self, service: Service, work: Work) -> None:
        """Has the engine take them on. Raises ApiError where it does not."""
        self.work, self._service = work, service
        self.completion_tokens = 0
        self._forced: dict[int, int] = {}
        metrics = service.metrics
        try:
            self._streams = service.engine.submit(*work.requests)
        except TooLargeError as error:
            metrics.rejected.labels("too_large").inc()
            raise ApiError(400, str(error), code="too_large") from None
        except QueueFullError as error:
            metrics.rejected.labels("full").inc()
            raise ApiError(
                429, str(error), type="rate_limit_error", code="rate_limit_exceeded", headers=RETRY
            ) from None
        except StoppingError as error:
            raise self._stopping(error) from None
        except UserError as error:
            raise unwritable(error) from None
        self._start = time.monotonic()
        self._end = asyncio.get_running_loop().time() + service.timeout
        metrics.tokens.labels("prompt").inc(work.prompt_tokens)

    def cancel(self) -> None:
        """Have the engine drop what is not yet written."""
        for stream in self._streams:
            stream.cancel()

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Every piece, after its text's number. Raises ApiError, or what went wrong; its end cancels the rest."""
        arrived: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        readers = [asyncio.create_task(_read(i, stream, arrived)) for i, stream in enumerate(self._streams)]
        times: dict[int, float] = {}
        unfinished = len(readers)
        try:
            while unfinished:
                try:
                    async with asyncio.timeout_at(self._end):
                        i, piece = await arrived.get()
                except TimeoutError:
                    message = f"not done within {self._service.timeout:g} seconds"
                    raise ApiError(504, message, type=SERVER, code="timeout") from None
                if isinstance(piece, StoppingError):
                    raise self._stopping(piece) from None
                if isinstance(piece, Exception):
                    raise piece
                self._count(i, piece, times)
                unfinished -= bool(piece.finished)
                yield i, piece
        finally:
            self.cancel()
            for reader in readers:
                reader.cancel()

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far: of prompts, however many texts each has, those that were given out, and where texts are held
        to a grammar, those that it put in the place of others."""
        prompt, completion = self.work.prompt_tokens, self.completion_tokens
        counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return counts | ({"forced_tokens": sum(self._forced.values())} if self.work.held else {})

    def _count(self, i: int, piece: Piece, times: dict[int, float]) -> None:
        now, metrics = time.monotonic(), self._service.metrics
        (metrics.block if i in times else metrics.first_block).observe(now - times.get(i, self._start))
        times[i] = now
        self.completion_tokens += len(piece.tokens)
        self._forced[i] = piece.forced
        metrics.tokens.labels("written").inc(len(piece.tokens))

    def _stopping(self, error: StoppingError) -> ApiError:
        self._service.metrics.rejected.labels("stopping").inc()
        return ApiError(503, str(error), type=SERVER, code="stopping", headers=RETRY)


async def _read(i: int, stream: Stream, arrived: "asyncio.Queue[tuple[int, Piece | Exception]]") -> None:
    try:
        async for piece in stream:
            arrived.put_nowait((i, piece))
    except Exception as error:
        arrived.put_nowait((i, error))
