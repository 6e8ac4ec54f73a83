"""The HTTP interface: OpenAI's, with settings of our own beside its fields (docs/guide/serving.md)."""

import asyncio
import time
from collections.abc import Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from opencola.errors import UserError
from opencola.models.sampling import Sampling
from opencola.serve.about import about
from opencola.serve.access import Access
from opencola.serve.answers import Answer, Chat, Completion, Shape
from opencola.serve.body import read
from opencola.serve.engine import Engine
from opencola.serve.errors import GONE, ApiError, unknown_model, unwritable
from opencola.serve.events import Events
from opencola.serve.prompts import work_of
from opencola.serve.protocol import Body, ChatBody, CompletionBody, with_settings
from opencola.serve.service import Service
from opencola.serve.texts import Texts

PAGE = Path(__file__).parent / "page.html"
UNFRAMED = {"Content-Security-Policy": "frame-ancestors 'none'"}
"""The page says all else of its policy itself; this is only heeded in a header."""
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
    created = int(time.time())
    model = {"id": name, "object": "model", "created": created, "owned_by": "opencola", "opencola": about(sampling)}

    @api.get("/")
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=UNFRAMED)

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
            raise unknown_model(asked, name)
        return model

    def route(path: str, kind: type[Body], shape: Shape) -> None:
        async def answer(request: Request) -> Response:
            return await answered(service, request, kind, shape)

        place = f"#/paths/{path.replace('/', '~1')}/post/requestBody/content/application~1json/schema/$defs"
        schema = kind.model_json_schema(ref_template=f"{place}/{{model}}")
        asked = {"required": True, "content": {"application/json": {"schema": schema}}}
        api.post(path, openapi_extra={"requestBody": asked})(answer)

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
    answer, told = Answer(service, Texts(service, work), shape), request.state.told
    with ExitStack() as unless_streamed:
        unless_streamed.callback(lambda: told.update(answer.texts.usage))
        unless_streamed.callback(answer.texts.cancel)
        chunks = answer.chunks(body.counted)
        try:
            # of a stream the first chunk, so that what goes wrong before it has a status
            first = await _unless_gone(request, anext(chunks) if body.stream else answer.whole())
        except UserError as error:  # comes out in writing only, as of settings beyond a model's numbers
            raise unwritable(error) from None
        if first is None:
            told["status"] = GONE
            return Response(status_code=GONE)
        if not body.stream:
            return JSONResponse(first)
        unless_streamed.pop_all()
    return Events(answer.texts, first, chunks, told, service.timeout + GRACE)


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


def _error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


def _http_error(request: Request, error: Exception) -> Response:
    """Of the router: paths and methods that there are not."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    said = {404: f"there is no {path}", 405: f"{path} knows no {method}"}.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, said, headers=dict(error.headers or {})).response()
