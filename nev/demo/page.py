"""The server of `nev demo`: the page, the index behind it, and nothing else."""

from __future__ import annotations

import socket

import typer

from nev.demo.searchable import TABLE, Searchable
from nev.serve.server import ServeError, bind, describe_address, is_loopback, local_names, run_server

PORT = 8000


def bind_demo(host: str, port: int | None) -> socket.socket:
    """Take an address. port: None is PORT, or a free one where that is taken. Raises ServeError."""
    if port is not None:
        return bind(host, port)
    try:
        return bind(host, PORT)
    except ServeError:
        return bind(host, 0)


def serve(ready: Searchable, taken: socket.socket, host: str) -> None:
    """Answer until Ctrl-C. taken: of `bind_demo`. Ends Ray, which the page does not need."""
    import ray

    from nev.search.index import open_index
    from nev.serve.app import make_app
    from nev.serve.open_engine import open_engine
    from nev.serve.settings import Settings

    ray.shutdown()
    hosts = local_names(host) if is_loopback(host) else None
    app = make_app(open_engine(ready.model), open_index(ready.location, TABLE), Settings(hosts=hosts))
    address = describe_address(host, taken.getsockname()[1])
    run_server(app, taken, lambda: typer.echo(f"open {address} in a browser; Ctrl-C ends"))
