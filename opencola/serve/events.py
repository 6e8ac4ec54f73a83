"""A stream of an answer's chunks, as server-sent events."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from opencola.errors import UserError
from opencola.serve.access import LOG
from opencola.serve.errors import GONE, ApiError, failed, unwritable
from opencola.serve.texts import Texts

Chunks = AsyncGenerator[dict[str, Any], None]


class Events(StreamingResponse):
    """Chunks, an error or [DONE] behind them. Whatever ends it, its texts end with it."""

    media_type = "text/event-stream"

    def __init__(
        self, texts: Texts, first: dict[str, Any], chunks: Chunks, told: dict[str, Any], seconds: float
    ) -> None:
        """told: what the log says of the request; seconds: after which a client that reads too slowly is left."""
        self._texts, self._chunks, self._told, self._seconds = texts, chunks, told, seconds
        self._told["status"] = GONE  # unless it comes to its end
        self._lines = self._written(first)
        super().__init__(self._lines, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)
        except TimeoutError:  # nobody reads
            pass
        finally:
            self._texts.cancel()
            await self._lines.aclose()
            await self._chunks.aclose()
            self._told |= self._texts.usage

    async def _written(self, first: dict[str, Any]) -> AsyncGenerator[str, None]:
        status = 200
        try:
            yield _event(first)
            async for chunk in self._chunks:
                yield _event(chunk)
            yield "data: [DONE]\n\n"
        except Exception as error:
            if not isinstance(error, ApiError | UserError):
                LOG.exception("a stream failed")
            answer = unwritable(error) if isinstance(error, UserError) else error
            answer = answer if isinstance(answer, ApiError) else failed()
            status = answer.status
            yield _event(answer.body)
        self._told["status"] = status


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
