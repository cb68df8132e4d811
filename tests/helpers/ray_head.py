"""A Ray of its own for a test, with metrics on: a head with free ports, which other Rays of this machine do not see."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

START_S, STOP_S = 120, 60  # a hang becomes an error; neither is a promise of speed


@dataclass(frozen=True)
class Head:
    """A running head.

    address: of the cluster.
    metrics: port of the node's metrics.
    env: of its clients.
    """

    address: str
    metrics: int
    env: dict[str, str]

    def scrape(self) -> str:
        """The metrics of the node, as Prometheus reads them; "" while the node does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""


def free_ports(count: int) -> list[int]:
    """Numbers of TCP ports that are free now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def ray_head(*options: str, **environment: str) -> Iterator[Head]:
    """A head with one CPU, whose metrics are sent each second. options: further ones of `ray start`."""
    # Not tmp_path: the sockets of Ray lie below this folder, and a socket's path has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="nev-head-"))
    port, metrics = free_ports(2)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env["RAY_AUTH_MODE"] = "disabled"  # else Ray asks for a token where the user's home has one
    env |= {"RAY_metrics_report_interval_ms": "1000", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1", **environment}
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--temp-dir={folder}"]
    command += [f"--port={port}", f"--metrics-export-port={metrics}", "--num-cpus=1"]
    command += [f"--object-store-memory={128 * 2**20}", "--include-dashboard=false", "--disable-usage-stats"]
    command += ["--dashboard-agent-listen-port=0", *options]
    output = folder / "head.txt"
    with output.open("wb") as file:
        head = subprocess.Popen(
            command, env=env, cwd=folder, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_S
        while "Ray runtime started" not in output.read_text():
            if head.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the head did not start:\n{output.read_text()}")
            time.sleep(0.1)
        yield Head(f"127.0.0.1:{port}", metrics, env)
    finally:
        head.terminate()  # it ends its own processes; `ray stop` would end every Ray of the machine
        head.wait(STOP_S)
        shutil.rmtree(folder, ignore_errors=True)
