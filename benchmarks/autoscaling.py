"""Decoders that come and go: a stream on a cluster whose nodes are processes of this machine, under Ray's autoscaler v2.

make bench NAME=autoscaling

A block takes a second of a CPU. The consumer takes 1.8 blocks a second, which needs two decoders of a CPU each, and later 0.6.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console

from benchmarks import report
from benchmarks.contestants.local_nodes import DECODER, Cloud, autoscaling_cloud, end_node
from benchmarks.contestants.processes import REPOSITORY, BenchmarkFailed
from nev.common.cli import make_command, report_errors

BLOCK_S, FAST, SLOW = 1.0, 1.8, 0.6
IDLE_S = 10.0
SETTLE_S, WATCH_S, LIMIT_S = 60.0, 30.0, 180.0
NOTES = (
    "Each node is a `ray start` of one CPU that boots in 2 s and goes after 10 s without work; of five at most. The need is the "
    "pace times a second of a CPU a block, 1.8 and 0.6 CPUs, and what Ray takes for a block beside.",
    "up_s: from the driver's start until two decoders are there. settled_decoders: the most that are there in 30 s, 60 s later. "
    "Then a decoder is killed. down_s: from the slower pace, half a minute later, until one decoder is left.",
    "The numbers of all blocks are compared at the end: each once, in order.",
)


class Watch(NamedTuple):
    """A running stream. pace: the file that sets the pace. steps: the file of the steps so far."""

    cloud: Cloud
    pace: Path
    steps: Path
    driver: subprocess.Popen[bytes]

    def seconds_until(self, what: Callable[[], bool]) -> float:
        """The time until `what()` is true. Raises BenchmarkFailed after `LIMIT_S`, or where the stream has ended."""
        begin = time.monotonic()
        while not what():
            if self.driver.poll() is not None or time.monotonic() - begin > LIMIT_S:
                raise BenchmarkFailed(f"nothing in {time.monotonic() - begin:.0f} s")
            time.sleep(0.2)
        return time.monotonic() - begin

    def decoders(self) -> int:
        """The decoders that are there."""
        return len(self.cloud.alive())


def main(
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds.")] = 3,
    results: Annotated[Path, typer.Option(help="Folder of autoscaling.json.", show_default="benchmarks/results")] = (
        report.RESULTS
    ),
) -> None:
    """Measure how decoders come and go; writes benchmarks/results/autoscaling.json."""
    console = Console()
    with report_errors():
        figures: dict[str, list[float]] = {}
        for number in range(repetitions):
            measured = measure()
            for name, value in measured.items():
                figures.setdefault(name, []).append(value)
            console.print(f"round {number + 1}/{repetitions}  {measured}", highlight=False)
        report.write(
            "autoscaling",
            report.this_command(),
            figures,
            {},
            NOTES,
            folder=results,
            console=console,
            goals={
                "settled_decoders": report.Goal(3, at_most=True),
                "down_s": report.Goal(IDLE_S + 40, at_most=True),
            },
        )


def measure() -> dict[str, float]:
    """One stream: up, settled, a lost decoder, down."""
    with (
        tempfile.TemporaryDirectory(prefix="nev-bench-") as name,
        autoscaling_cloud({"decoder": DECODER}, IDLE_S) as cloud,
    ):
        pace, steps = Path(name, "pace"), Path(name, "steps")
        pace.write_text(str(FAST))
        command = [sys.executable, "-m", "benchmarks.contestants.paced_stream", str(BLOCK_S), str(pace)]
        with steps.open("wb") as output:
            driver = subprocess.Popen(command, env=cloud.env, cwd=REPOSITORY, stdout=output, stderr=subprocess.DEVNULL)
        watch = Watch(cloud, pace, steps, driver)
        try:
            figures = {"up_s": watch.seconds_until(lambda: watch.decoders() >= 2)}
            watch.seconds_until(lambda: bool(steps.read_text()))
            time.sleep(SETTLE_S)
            figures["settled_decoders"] = float(most_decoders(watch))
            there = list(cloud.alive())
            end_node(there[0])
            watch.seconds_until(lambda: there[0] not in cloud.alive() and watch.decoders() >= 2)
            time.sleep(SETTLE_S / 2)
            pace.write_text(str(SLOW))
            figures["down_s"] = watch.seconds_until(lambda: watch.decoders() == 1)
        finally:
            pace.write_text("0")
            driver.wait(LIMIT_S)
        numbers = [number for line in steps.read_text().splitlines() for number in json.loads(line)["blocks"]]
        if numbers != list(range(len(numbers))):
            raise BenchmarkFailed("a block is missing, or came twice")
    return {name: round(value, 1) for name, value in figures.items()}


def most_decoders(watch: Watch) -> int:
    """The most decoders that are there in the next `WATCH_S`."""
    most, end = 0, time.monotonic() + WATCH_S
    while time.monotonic() < end:
        most = max(most, watch.decoders())
        time.sleep(0.5)
    return most


app = make_command(main, "make bench NAME=autoscaling")

if __name__ == "__main__":
    app()
