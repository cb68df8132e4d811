"""Heads of Ray on this machine: each a cluster of its own, with ports and a folder of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contestants.processes import BenchmarkFailed

BIN = Path(sys.executable).parent
START_S, STOP_S = 240, 60  # a hang becomes an error; neither is a promise of speed


@dataclass(frozen=True)
class Head:
    """A running head.

    address: of its job server. folder: its --temp-dir. env: what a client needs, the mode and the token's path.
    """

    address: str
    folder: Path
    env: dict[str, str]


@contextmanager
def job_head() -> Iterator[Head]:
    """A head with a job server and a token, for the body of a `with`. Raises BenchmarkFailed where it does not start."""
    with head_folder() as folder:
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        (port,) = free_ports(1)
        env = environment_without_ray()
        env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PATH": f"{BIN}:{os.environ['PATH']}"}
        env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        options = ["--port=0", "--num-cpus=2", f"--object-store-memory={256 * 2**20}"]
        options += [f"--dashboard-port={port}", "--dashboard-host=127.0.0.1", "--dashboard-agent-listen-port=0"]
        with running_head(folder, env, options):
            yield Head(f"http://127.0.0.1:{port}", folder, env)


@contextmanager
def head_folder() -> Iterator[Path]:
    """A folder for a head. Not pytest's: Ray's sockets lie below this one, and a socket's path has at most 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="nev-head-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def environment_without_ray() -> dict[str, str]:
    """This process's environment without what is meant for another Ray."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return env | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1"}


def free_ports(count: int) -> list[int]:
    """Numbers of TCP ports of this machine that are free now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def running_head(folder: Path, env: Mapping[str, str], options: list[str]) -> Iterator[None]:
    """`ray start --head` with these options for the body of a `with`. Raises BenchmarkFailed where it does not start."""
    output = folder / "head.txt"
    command = [
        str(BIN / "ray"),
        "start",
        "--head",
        "--block",
        f"--temp-dir={folder}",
        "--disable-usage-stats",
        *options,
    ]
    with output.open("wb") as file:
        head = subprocess.Popen(
            command, env=env, cwd=folder, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_S
        while "Ray runtime started" not in output.read_text():
            if head.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkFailed(f"the head did not start:\n{output.read_text()}")
            time.sleep(0.1)
        yield
    finally:
        head.terminate()  # it ends its own processes; `ray stop` would end every Ray of the machine
        head.wait(STOP_S)
