"""The HTTP interface: OpenAI's, with settings of our own beside its fields (docs/guide/serving.md)."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Coroutine
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from opencola.errors import UserError
from opencola.models.sampling import Sampling
from opencola.serve.access import LOG, Access
from opencola.serve.answers import Answer, Chat, Completion, Shape
from opencola.serve.body import read
from opencola.serve.engine import Engine
from opencola.serve.errors import GONE, ApiError, failed
from opencola.serve.prompts import work_of
from opencola.serve.protocol import Body, ChatBody, CompletionBody, with_settings
from opencola.serve.service import Service
from opencola.serve.texts import Texts

PAGE = Path(__file__).parent / "page.html"
GRACE = 5.0
"""Seconds beyond a request's time until a client that does not read is left."""


def app(engine: Engine, name: str, sampling: Sampling, **options: Any) -> FastAPI:
    """An application for one model; options: further fields of Service."""
    service = Service(engine, name, sampling, **options)
    kinds: dict[str, tuple[type[Body], Shape]] = {
        "/v1/completions": (with_settings(CompletionBody, type(sampling)), Completion()),
        "/v1/chat/completions": (with_settings(ChatBody, type(sampling)), Chat()),
    }
    api = FastAPI(title="OpenCola", docs_url=None, redoc_url=None)
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "opencola"}

    @api.get("/")
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    @api.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @api.get("/v1/models/{asked:path}")
    async def one_model(asked: str) -> dict[str, Any]:
        if asked != name:
            raise ApiError(
                404, f"there is no model {asked!r}; there is {name!r}", param="model", code="model_not_found"
            )
        return model

    def route(path: str, kind: type[Body], shape: Shape) -> None:
        async def answer(request: Request) -> Response:
            return await answered(service, request, kind, shape)

        schema = kind.model_json_schema(
            ref_template=f"#/paths/{path.replace('/', '~1')}/post/requestBody/content/"
            "application~1json/schema/$defs/{model}"
        )
        api.post(path, openapi_extra={"requestBody": {"content": {"application/json": {"schema": schema}}}})(answer)

    for path, (kind, shape) in kinds.items():
        route(path, kind, shape)
    counted = {"/", "/health", "/metrics", "/v1/models", *kinds}
    api.add_middleware(Access, service=service, paths=counted)
    api.add_exception_handler(ApiError, _error)
    api.add_exception_handler(HTTPException, _http_error)
    return api


async def answered(service: Service, request: Request, kind: type[Body], shape: Shape) -> Response:
    """The answer to a request for texts. Raises ApiError."""
    body = await read(request, kind, service.max_body)
    work = await asyncio.to_thread(work_of, service, body)
    answer = Answer(service, Texts(service, work), shape)
    if body.stream:
        return Events(answer, body.counted, request.state.told, service.timeout + GRACE)
    try:
        whole = await _unless_gone(request, answer.whole())
    except UserError as error:  # what only comes out in writing, such as settings beyond a model's numbers
        raise ApiError(400, str(error), code="invalid_value") from None
    finally:
        answer.texts.cancel()
        request.state.told |= answer.texts.usage
    if whole is None:
        request.state.told["status"] = GONE
        return Response(status_code=GONE)
    return JSONResponse(whole)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """What the work gives; None where the client leaves before, and the work is stopped."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(left())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Events(StreamingResponse):
    """An answer's chunks as server-sent events; it takes its texts along when it ends, whatever ends it."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, counted: bool, told: dict[str, Any], seconds: float) -> None:
        self._texts, self._told, self._seconds = answer.texts, told, seconds
        self._told["status"] = GONE  # unless it comes to its end
        self._events = self._lines(answer.chunks(counted))
        super().__init__(self._events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)
        finally:
            self._texts.cancel()
            await self._events.aclose()
            self._told |= self._texts.usage

    async def _lines(self, chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[str, None]:
        status = 200
        try:
            async for chunk in chunks:
                yield _event(json.dumps(chunk, ensure_ascii=False))
        except ApiError as error:
            status = error.status
            yield _event(json.dumps(error.body))
        except UserError as error:
            status = 400
            yield _event(json.dumps(ApiError(status, str(error), code="invalid_value").body))
        except Exception:
            LOG.exception("a stream failed")
            status = 500
            yield _event(json.dumps(failed().body))
        else:
            yield _event("[DONE]")
        self._told["status"] = status


def _event(data: str) -> str:
    return f"data: {data}\n\n"


def _error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


def _http_error(request: Request, error: Exception) -> Response:
    """Of the router: paths and methods that there are not."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    said = {404: f"there is no {path}", 405: f"{path} knows no {method}"}.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, said, headers=dict(error.headers or {})).response()
