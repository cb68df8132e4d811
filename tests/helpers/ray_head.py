"""A Ray of its own for a test, with metrics on."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.contestants.head import environment_without_ray, free_ports, head_folder, running_head


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


@contextmanager
def ray_head(*options: str, **environment: str) -> Iterator[Head]:
    """A head with one CPU, whose metrics are sent each second. options: further ones of `ray start`."""
    port, metrics = free_ports(2)
    env = environment_without_ray() | {"RAY_metrics_report_interval_ms": "1000", **environment}
    env["RAY_AUTH_MODE"] = "disabled"  # else Ray asks for a token where the user's home has one
    start = ["--node-ip-address=127.0.0.1", f"--port={port}", f"--metrics-export-port={metrics}", "--num-cpus=1"]
    start += [f"--object-store-memory={128 * 2**20}", "--include-dashboard=false", "--dashboard-agent-listen-port=0"]
    with head_folder() as folder, running_head(folder, env, [*start, *options]):
        yield Head(f"127.0.0.1:{port}", metrics, env)
