"""Errors as clients read them: JSON with a code, no traceback, no path."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from ..errors import RequestError
from .orders import ServerError

log = logging.getLogger(__name__)
LONGEST = 600  # characters of a message; it may quote what a client sent

STATUS: Mapping[str, int] = {
    "invalid_request": 422,
    "url_not_allowed": 400,
    "unauthorized": 401,
    "forbidden_origin": 403,
    "forbidden_host": 403,
    "not_found": 404,
    "model_not_found": 404,
    "method_not_allowed": 405,
    "cancelled": 409,
    "too_large": 413,
    "unsupported_media": 415,
    "queue_full": 429,
    "rate_limited": 429,
    "internal": 500,
    "insufficient_memory": 503,
    "not_ready": 503,
    "timeout": 504,
}
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
OPENAI = ("/v1/images", "/v1/models")


class Refused(ServerError):
    """An error whose status is not its code's, that says when to come again, or has headers."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        hint: str | None = None,
        status: int | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(code, message, param=param, hint=hint)
        self.status, self.retry_after, self.headers = status, retry_after, headers or {}


def invalid(message: str, param: str | None = None, hint: str | None = None) -> ServerError:
    """The refusal of an argument."""
    return ServerError("invalid_request", message, param=param, hint=hint)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint to the nearest of some names, or to all of them."""
    names = list(known)
    near = difflib.get_close_matches(name[:64], names, 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else f"there is {', '.join(names) or 'none'}"


class Told(BaseModel):
    """What went wrong."""

    code: str = Field(description=f"One of {', '.join(STATUS)}.")
    message: str
    param: str | None = Field(description="The field at fault.")
    hint: str | None = Field(description="What to do.")
    request_id: str
    type: str | None = Field(default=None, description="As OpenAI's API calls it; of its routes.")


class Problem(BaseModel):
    """Every answer that is no success."""

    error: Told


def responses(*codes: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of some error statuses, and of those that any route may answer."""
    return {code: {"model": Problem} for code in sorted({401, 403, 429, 500, 503, *codes})}


def status_of(error: ServerError) -> int:
    """The HTTP status of an error."""
    return getattr(error, "status", None) or STATUS.get(error.code, 500)


def told(error: ServerError, request_id: str, path: str) -> dict[str, Any]:
    """The body of an answer."""
    message, is_openai = str(error), path.startswith(OPENAI)
    if len(message) > LONGEST:
        message = message[:LONGEST] + "…"
    if is_openai and error.hint:  # its clients print the message alone
        message += f"; {error.hint[:LONGEST]}"
    found = {
        "code": error.code,
        "message": message,
        "param": error.param and error.param[:128],
        "hint": error.hint and error.hint[:LONGEST],
        "request_id": request_id,
    }
    if is_openai:
        status = status_of(error)
        fallback = "invalid_request_error" if status < 500 else "server_error"
        found["type"] = TYPES.get(status, fallback)
    return {"error": found}


def answer(error: ServerError, request_id: str, path: str) -> Response:
    """An error as a response."""
    status = status_of(error)
    headers = {"X-Error-Code": error.code, **getattr(error, "headers", {})}
    if (seconds := getattr(error, "retry_after", None)) is not None:
        headers["Retry-After"] = str(max(1, math.ceil(seconds)))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status in (408, 413):  # the rest of the body is not read
        headers["Connection"] = "close"
    return JSONResponse(told(error, request_id, path), status, headers)


def known(error: BaseException, request_id: str) -> ServerError:
    """Any exception as an error that a client may see; what is unexpected goes to the log."""
    if isinstance(error, ServerError):
        return error
    if isinstance(error, RequestError):
        return invalid(str(error))
    if isinstance(error, MemoryError):
        return ServerError("insufficient_memory", "not enough memory", hint="ask for less")
    if isinstance(error, HTTPException):
        return of_http(error)
    if isinstance(error, RequestValidationError):  # of a query
        entry = error.errors()[0]
        return invalid(f"{entry['loc'][-1]}: {entry['msg']}", str(entry["loc"][-1]))
    log.error("request %s failed", request_id, exc_info=error)
    return ServerError(
        "internal", "something went wrong here", hint=f"the log tells more of {request_id}"
    )


def of_http(error: HTTPException) -> ServerError:
    """An error of the router's own."""
    if error.status_code == 404:
        return ServerError("not_found", "there is nothing here", hint="see /openapi.json")
    if error.status_code == 405:
        allowed = error.headers  # Allow
        message = "not by this method"
        hint = "see /openapi.json"
        return Refused("method_not_allowed", message, hint=hint, headers=allowed)
    return Refused("invalid_request", "the request cannot be read", status=error.status_code)


def allowed(request: Request) -> dict[str, str]:
    """The methods of all routes of a path; the router tells those of the first."""
    path = getattr(request.scope.get("route"), "path", "")
    methods = request.app.openapi()["paths"].get(path)
    return {} if methods is None else {"Allow": ", ".join(sorted(map(str.upper, methods)))}


def install(app: FastAPI) -> None:
    """Answer every exception of the app's routes by JSON."""

    async def told_as_json(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            return Response(status_code=499)  # nobody reads it
        request_id = request.scope["state"]["request_id"]
        response = answer(known(error, request_id), request_id, request.scope["path"])
        if response.status_code == 405:
            response.headers.update(allowed(request))
        return response

    for kind in (
        *(ServerError, HTTPException, RequestError, RequestValidationError, ClientDisconnect),
        Exception,
    ):
        app.add_exception_handler(kind, told_as_json)
