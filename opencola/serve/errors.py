"""Errors as clients of OpenAI's interface know them: {"error": {"message", "type", "param", "code"}}."""

import reprlib
import textwrap
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError

from opencola.errors import UserError

INVALID, SERVER = "invalid_request_error", "server_error"
GONE = 499
"""The status, in logs and counts alone, of requests whose client left before the answer."""


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """The answer itself."""
        return JSONResponse(self.body, self.status, self.headers)


def failed() -> ApiError:
    """What a client is told of a bug of ours; the log has the rest."""
    return ApiError(500, "the server failed; its log says more", type=SERVER, code="internal_error")


def unwritable(error: UserError) -> ApiError:
    """For what only comes out when a text is written, such as settings beyond a model's numbers."""
    return ApiError(400, str(error), code="invalid_value")


def unknown_model(asked: str, there: str) -> ApiError:
    """For a request that names a model which is not there."""
    message = f"there is no model {reprlib.repr(asked)}; there is {there!r}"
    return ApiError(404, message, param="model", code="model_not_found")


def invalid(error: ValidationError, fields: list[str]) -> ApiError:
    """The first mistake in a body; fields: those that there are."""
    first: dict[str, Any] = dict(error.errors(include_url=False, include_input=False)[0])
    param, kind = _path(first["loc"]), first["type"]
    said = first["msg"][:1].lower() + first["msg"][1:]
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}")
    if kind == "extra_forbidden":
        known = f"; there are: {', '.join(fields)}" if len(first["loc"]) == 1 else ""
        return ApiError(400, f"there is no field {param!r}{known}", param=param, code="unknown_parameter")
    if not param:
        return ApiError(400, "the body must be a JSON object")
    if kind == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    return ApiError(400, f"{param}: {said}", param=param, code="invalid_value")


def _path(loc: tuple[int | str, ...]) -> str:
    """A place in a body, as in `messages[0].content`."""
    names = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return textwrap.shorten("".join(names).lstrip("."), 100, placeholder="...")
