"""One process that serves: the socket, uvicorn, and the line that says where."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from nev.common.errors import NevError

if TYPE_CHECKING:
    from fastapi import FastAPI

GRACE_SECONDS = 30  # until requests that are being answered are broken off at the end
KEEP_ALIVE_SECONDS = 75  # more than clients and proxies keep an idle connection, so that they close it first
BACKLOG = 2048
TOKEN_VARIABLE = "NEV_TOKEN"


class ServeError(NevError, ValueError):
    """A server that cannot start. The message says what is wrong, and what to do."""


def bind(host: str, port: int) -> socket.socket:
    """Take an address, before a model is loaded. port: 0 takes a free one. Raises ServeError where it is taken, or not here."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, socket.SOCK_STREAM)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except (OSError, OverflowError) as error:
        raise ServeError(f"{host}:{port} cannot be bound ({error}). --port 0 takes a free port") from error
    return taken


def read_token(file: str | None) -> SecretStr | None:
    """The token from a file, else from NEV_TOKEN, else None. Raises ServeError for a file without a token."""
    if file is None:
        token, where = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
        if token is None:
            return None
    else:
        where = file
        try:
            token = Path(file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ServeError(f"--token-file {file}: cannot be read ({error})") from error
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ServeError(f"{where} has no token: one line of printable ASCII, without spaces")
    return SecretStr(token)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def local_names(host: str, more: Sequence[str] = ()) -> frozenset[str]:
    """The names of a server that only this machine reaches, for `Settings.hosts`. more: further names, such as a proxy's."""
    own = f"[{host}]" if ":" in host else host
    return frozenset(name.lower() for name in ("localhost", "127.0.0.1", "[::1]", own, *more))


def describe_address(host: str, port: int) -> str:
    """The URL of a server."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(
    app: FastAPI,
    taken: socket.socket,
    when_ready: Callable[[], object],
    when_made: Callable[[Any], object] = lambda server: None,
) -> None:
    """Answer until SIGTERM or Ctrl-C, after which no new request is taken, and those that came are answered.

    taken: of `bind`. when_ready: called once, when requests are answered.
    when_made: called once with uvicorn's server, whose `should_exit` ends it from another thread.
    """
    import uvicorn

    class Server(uvicorn.Server):
        """uvicorn, which says when it is ready."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                when_ready()

    options: dict[str, Any] = {
        "lifespan": "on",
        "log_config": None,  # errors reach stderr; nothing else does
        "access_log": False,
        "server_header": False,
        "ws": "none",
        "timeout_keep_alive": KEEP_ALIVE_SECONDS,
        "timeout_graceful_shutdown": GRACE_SECONDS,
        "backlog": BACKLOG,
    }
    server = Server(uvicorn.Config(app, **options))
    when_made(server)
    server.run([taken])
