"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`, for everything that a server refuses."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

SHOWN = 3  # errors of one request that are listed
REFUSED = "invalid_request_error"
# The `type` of an error by its status, as OpenAI's API has it.
TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class ErrorDetails(BaseModel):
    """What went wrong."""

    message: str
    """What is wrong, and what to do."""
    type: str
    """Kind of the error, such as `invalid_request_error`."""
    param: str | None = None
    """Place in the request, such as `input[3]`."""
    code: str | None = None
    """Name of the error for programs, such as `queue_full`."""


class ErrorAnswer(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorDetails


class ApiError(HTTPException):
    """A request that is refused. status: of HTTP. Other arguments: as `ErrorDetails`; headers: of the answer.

    An HTTPException, since FastAPI would turn any other that comes up while it reads a body into a 400.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code

    def make_answer(self) -> JSONResponse:
        """The answer to the request."""
        kind = TYPES.get(self.status_code, REFUSED)
        details = {"message": self.detail, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": details}, self.status_code, self.headers)


def describe_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for the OpenAPI document."""
    return {status: {"model": ErrorAnswer, "description": HTTPStatus(status).phrase} for status in statuses}


def add_error_handlers(app: FastAPI) -> None:
    """Give every error of the application OpenAI's form."""

    @app.exception_handler(HTTPException)
    async def answer_http_error(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error, ApiError):
            return error.make_answer()
        message = f"{error.detail}: {request.method} {request.url.path}"
        return ApiError(error.status_code, message, headers=error.headers).make_answer()

    @app.exception_handler(RequestValidationError)
    async def answer_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return _describe_validation(error).make_answer()

    @app.exception_handler(Exception)
    async def answer_bug(request: Request, error: Exception) -> JSONResponse:
        # The server logs the traceback. A caller gets no more than the fact.
        return ApiError(500, "the server failed at this request; its log says why", code="internal_error").make_answer()


def _describe_validation(error: RequestValidationError) -> ApiError:
    """One message for the errors of pydantic, the first few of them."""
    errors = error.errors()
    first = errors[0]
    if first["loc"] == ("body",):
        return ApiError(422, "the body has to be a JSON object, with Content-Type: application/json", code="no_json")
    places: dict[str, str | None] = {}  # of each message the first
    for each in errors:
        places.setdefault(str(each["msg"]), _name_place(each["loc"]))
    listed = [f"{place}: {text}" if place else text for text, place in places.items()]
    more = f"; and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ApiError(422, "; ".join(listed[:SHOWN]) + more, _name_place(first["loc"]), str(first["type"]))


def _name_place(parts: tuple[Any, ...]) -> str | None:
    """`("body", "input", 3, "text", "text")` to `input[3].text`. Names of pydantic's alternatives are not places."""
    place = ""
    for part in parts[1:]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part.isidentifier():
            place += f".{part}" if place else part
    return place or None
