"""Reading the body of a request, within its limits."""

import asyncio
from contextlib import suppress

from fastapi import Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from opencola.serve.errors import GONE, ApiError, invalid
from opencola.serve.protocol import BodyKind

SECONDS = 60.0
"""For a body to arrive."""
DRAINED = 64 * 2**20
"""Bytes that are read of a body which is too long, so that its sender comes to read the answer."""


async def read(request: Request, kind: type[BodyKind], limit: int) -> BodyKind:
    """The body, checked. Raises ApiError for what is none, too long or too slow."""
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"the body must be application/json, but is {content_type or 'of no type'}")
    raw = await _read(request, limit)
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise invalid(error, [*kind.model_fields]) from None


async def _read(request: Request, limit: int) -> bytes:
    parts, size = [], 0
    with suppress(ValueError):
        if int(request.headers.get("content-length", "")) > limit and "expect" in request.headers:
            raise _too_long(limit)  # the sender waits for leave to send
    try:
        async with asyncio.timeout(SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    parts.append(part)
                if size > DRAINED:
                    break
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {SECONDS:g} seconds", code="timeout") from None
    except ClientDisconnect:
        raise ApiError(GONE, "the client left while it sent the body") from None
    if size > limit:
        raise _too_long(limit)
    return b"".join(parts)


def _too_long(limit: int) -> ApiError:
    return ApiError(413, f"the body is longer than {limit} bytes", code="body_too_long")
