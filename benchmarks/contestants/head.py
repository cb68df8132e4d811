"""A head of Ray on this machine with its job server: a cluster of its own, with ports, a folder and a token of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    """A head for the body of a `with`. Raises BenchmarkFailed where it does not start."""
    # Not pytest's folder: the sockets of Ray lie below this one, and a socket's path has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="nev-job-"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PATH": f"{BIN}:{os.environ['PATH']}"}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1"}
    options = ["--port=0", "--num-cpus=2", f"--object-store-memory={256 * 2**20}", "--disable-usage-stats"]
    options += [f"--dashboard-port={port}", "--dashboard-host=127.0.0.1", "--dashboard-agent-listen-port=0"]
    output = folder / "head.txt"
    with output.open("wb") as file:
        head = subprocess.Popen(
            [str(BIN / "ray"), "start", "--head", "--block", f"--temp-dir={folder}", *options],
            env=env,
            cwd=folder,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_started(head, output)
        yield Head(f"http://127.0.0.1:{port}", folder, env)
    finally:
        head.terminate()  # it ends its own processes; `ray stop` would end every Ray of the machine
        head.wait(STOP_S)
        shutil.rmtree(folder, ignore_errors=True)


def wait_until_started(head: subprocess.Popen[bytes], output: Path) -> None:
    """Wait until the job server answers. Raises BenchmarkFailed with what the head printed."""
    deadline = time.monotonic() + START_S
    while "Ray runtime started" not in output.read_text():
        if head.poll() is not None or time.monotonic() > deadline:
            raise BenchmarkFailed(f"the head did not start:\n{output.read_text()}")
        time.sleep(0.2)
