"""What every request passes before its route: the token, the sizes, and the count. One layer of plain ASGI: each costs time."""

from __future__ import annotations

import hmac
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nev.serve.errors import ApiError
from nev.serve.metrics import Meters
from nev.serve.settings import Settings

OPEN = ("/", "/health")  # what needs no token; so does all below STATIC
STATIC = "/static/"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
UNKNOWN = "unmatched"  # the route of a request that no route takes: a caller's path would be a label of the caller's
DIGITS = 20  # of a Content-Length that are read; Python refuses to read thousands


class Guard:
    """Refuses requests without the token and requests that are too large, and counts all of them."""

    def __init__(self, app: ASGIApp, settings: Settings, meters: Meters) -> None:
        self.app, self.settings, self.meters = app, settings, meters
        self.token = settings.token.get_secret_value().encode() if settings.token else None
        self.bytes_in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500
        body = _Body(self, receive)

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check_host(headers.get("host", ""))
            self._check_token(scope["path"], headers)
            self._check_length(headers.get("content-length"))
            await self.app(scope, body.receive, send_and_note)
        except ApiError as error:
            await error.make_answer()(scope, receive, send_and_note)
        finally:
            self.bytes_in_flight -= body.size
            self._count(scope, status, time.perf_counter() - start)

    def _check_host(self, host: str) -> None:
        hosts = self.settings.hosts
        name = host.lower() if host.endswith("]") else host.lower().rpartition(":")[0] or host.lower()
        if hosts is not None and name not in hosts:
            raise ApiError(
                421, "this server does not answer to that name: --allow-host NAME, or a token", code="other_host"
            )

    def _check_token(self, path: str, headers: Headers) -> None:
        if self.token is None or path in OPEN or path.startswith(STATIC):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.token):
            return
        raise ApiError(
            401,
            "a token is needed: Authorization: Bearer TOKEN",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _check_length(self, length: str | None) -> None:
        if length and length.isdecimal():
            self.check_size(int(length[:DIGITS]), 0)

    def check_size(self, size: int, more: int) -> None:
        """Refuse a body that is too large, or that would be too much beside the others. size: of the body; more: what is new."""
        most = self.settings.max_body_bytes
        if size > most:
            raise ApiError(
                413, f"a body may have {most:,} bytes", code="too_large", headers={"Connection": "close"}
            )  # the rest of the body is not read
        if self.bytes_in_flight + more > self.settings.max_bytes_in_flight:
            self.meters.rejected.labels("bytes").inc()
            headers = {"Retry-After": "1", "Connection": "close"}
            raise ApiError(429, "too many bytes are being answered: try again", code="too_many_bytes", headers=headers)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", UNKNOWN)
        method = "" if route == UNKNOWN else scope["method"] if scope["method"] in METHODS else "other"
        self.meters.requests.labels(route, method, str(status)).inc()
        self.meters.seconds.labels(route).observe(seconds)


class _Body:
    """The body of a request, counted as it comes. size: bytes so far."""

    def __init__(self, guard: Guard, receive: Receive) -> None:
        self._guard, self._receive, self.size = guard, receive, 0

    async def receive(self) -> Message:
        message = await self._receive()
        if new := len(message.get("body", b"")):
            self._guard.check_size(self.size + new, new)
            self._guard.bytes_in_flight += new
            self.size += new
        return message
