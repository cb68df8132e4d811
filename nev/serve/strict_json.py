"""Bodies of JSON, read strictly: no NaN, no half characters, which Python's own parser lets pass and a tokenizer does not."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from nev.serve.errors import ApiError


class StrictRequest(Request):
    """A request whose JSON is read by pydantic's parser."""

    async def json(self) -> Any:
        """The body. Raises ApiError, 422, for what is no JSON."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(422, f"the body is no JSON: {error}", code="no_json") from error


class StrictRoute(APIRoute):
    """A route of FastAPI that reads its body by StrictRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of the route."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly
