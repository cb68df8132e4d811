"""The MLflow server of deploy/mlflow under a sweep: what a child waits for `log_batch`, beside MLflow's own defaults.

make bench NAME=mlflow_server
python benchmarks/mlflow_server.py --children 8 --at-once 4 --calls 2 --repetitions 1

Run it on a quiet machine.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from pydantic import BaseModel
from rich.console import Console

from benchmarks import report
from benchmarks.contestants import mlflow_servers
from benchmarks.contestants.postgres import run_postgres
from nev.common.cli import make_command, report_errors
from nev.runs.tracking import open_run

GOAL_MS = 500.0
POINTS = 20  # of a call: what a run sends after some steps
VALUES = {
    "POSTGRES_PASSWORD": "of-postgres",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "of-the-admin",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "of-flask",
    "MLFLOW_ARTIFACTS": "s3://bucket/mlflow",
}
NOTES = (
    "A child is a thread with a client of its own: it makes a run below a parent, sends its points in calls of log_batch one "
    "after another, as a trial of nev ablate does, and ends the run. The figures are percentiles over all calls of log_batch.",
    "mlflow: the commands and the environment of deploy/mlflow/compose.yaml, its PostgreSQL on a socket of the same machine with "
    "default settings, everybody's password checked. mlflow_defaults: the same without `auth_cache_ttl_seconds`, so that each "
    "request hashes the password. Jobs are off in both: they would outlive the server.",
    "Server, PostgreSQL and children share the machine's cores.",
)


class Child(BaseModel):
    """The parameters of a child."""

    trial: int
    lr: float = 1e-3
    global_batch: int = 256


def without_cache(folder: Path) -> Path:
    """basic_auth.ini as it is with MLflow's default: no password is remembered."""
    lines = (mlflow_servers.FOLDER / "basic_auth.ini").read_text().splitlines()
    path = folder / "defaults.ini"
    path.write_text("\n".join(line for line in lines if not line.startswith("auth_cache_ttl_seconds")) + "\n")
    return path


def run_child(url: str, parent: str, calls: int, trial: int) -> list[float]:
    """Milliseconds of each call of log_batch."""
    tags = {"mlflow.parentRunId": parent}
    tracker = open_run(url, "sweep", f"trial-{trial}", Child(trial=trial), tags, "s3://bucket/runs")
    times = []
    for step in range(calls):
        tracker.log(step, {f"metric/{number}": float(step) for number in range(POINTS)})
        start = time.perf_counter()
        tracker.flush()
        times.append(1000 * (time.perf_counter() - start))
    tracker.finish("FINISHED")
    return times


def run_sweep(url: str, children: int, at_once: int, calls: int, rounds: Iterator[int]) -> list[float]:
    """Milliseconds of every call of log_batch of a parent's children."""
    number = next(rounds)
    parent = open_run(url, "sweep", f"parent-{number}", Child(trial=-1), {}, "s3://bucket/runs")
    with ThreadPoolExecutor(at_once) as pool:
        times = list(pool.map(partial(run_child, url, parent.run_id, calls), range(children)))
    parent.finish("FINISHED")
    return [time for part in times for time in part]


def main(
    children: Annotated[int, typer.Option(min=1, help="Runs below one parent.")] = 50,
    at_once: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 8,
    calls: Annotated[int, typer.Option(min=1, help="Calls of log_batch of a run.")] = 20,
    repetitions: Annotated[int, typer.Option(min=1, help="Sweeps.")] = 3,
    results: Annotated[Path, typer.Option(help="Folder of the JSON file.", show_default="benchmarks/results")] = (
        report.RESULTS
    ),
) -> None:
    """Measure the MLflow server; writes benchmarks/results/mlflow_server.json."""
    console, rounds = Console(), count()
    figures: dict[str, list[float]] = {}
    with report_errors(), ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nev-bench-")))
        postgres = stack.enter_context(run_postgres())
        mlflow_servers.make_databases(postgres, VALUES)
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        os.environ["MLFLOW_TRACKING_USERNAME"] = "admin"
        os.environ["MLFLOW_TRACKING_PASSWORD"] = VALUES["MLFLOW_AUTH_ADMIN_PASSWORD"]
        auth = {"mlflow": mlflow_servers.FOLDER / "basic_auth.ini", "mlflow_defaults": without_cache(folder)}
        for _ in range(repetitions):
            for name, config in auth.items():  # one server at a time: two would share the cores
                with mlflow_servers.run_mlflow(VALUES, postgres, folder / f"{name}.log", config) as server:
                    run_sweep(server.url, at_once, at_once, 1, rounds)  # every worker has made its connections
                    times = run_sweep(server.url, children, at_once, calls, rounds)
                for share in (50, 95):
                    figures.setdefault(f"{name}_p{share}_ms", []).append(float(np.percentile(times, share)))
                console.print(
                    f"{name}  p95 {figures[f'{name}_p95_ms'][-1]:.0f} ms of {len(times)} calls", highlight=False
                )
        report.write(
            "mlflow_server",
            report.this_command(),
            figures,
            {"defaults_vs_mlflow_p95": report.Ratio("mlflow_defaults_p95_ms", "mlflow_p95_ms")},
            NOTES,
            folder=results,
            console=console,
            goals={"mlflow_p95_ms": report.Goal(GOAL_MS, at_most=True)},
        )


app = make_command(main, "make bench NAME=mlflow_server")

if __name__ == "__main__":
    app()
