"""What every request goes through: an id, the key, a line in the log, a count, and an answer whatever goes wrong."""

import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Collection
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opencola.serve.errors import GONE, ApiError, failed
from opencola.serve.service import Service

LOG = logging.getLogger("opencola.serve")
REQUEST_ID = re.compile(rb"[\w.-]{1,64}")
OPEN = {"/", "/health"}
"""What may be asked for without the key."""


class Access:
    """Around the whole application. Of what a request asks for and what is written nothing is logged."""

    def __init__(self, app: ASGIApp, service: Service, paths: Collection[str]) -> None:
        """paths: those that are counted by their names."""
        self._app, self._service, self._paths = app, service, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, status = time.monotonic(), 0
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        told: dict[str, Any] = {}
        scope.setdefault("state", {})["told"] = told

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            if scope["path"] not in OPEN and not self._knows_key(headers.get(b"authorization", b"")):
                raise ApiError(
                    401,
                    "the API key is missing or wrong: send it as Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            await self._app(scope, receive, send_with_id)
        except ApiError as error:
            await error.response()(scope, receive, send_with_id)
        except Exception as error:
            LOG.exception("request %s failed", request_id.decode())
            told["error"] = type(error).__name__
            if status:  # the answer has begun, and ends here
                raise
            await failed().response()(scope, receive, send_with_id)
        finally:
            status = told.pop("status", status) or GONE
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._service.metrics.requests.labels(path, status).inc()
            line = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "id": request_id.decode(),
                "client": (scope.get("client") or ("",))[0],
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(time.monotonic() - start, 4),
                **told,
            }
            LOG.info(json.dumps(line))

    def _knows_key(self, given: bytes) -> bool:
        key = self._service.api_key
        scheme, _, said = given.partition(b" ")
        return key is None or (scheme.lower() == b"bearer" and hmac.compare_digest(said.strip(), key.encode()))
