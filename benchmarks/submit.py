"""From a command to the first step of training: `nev train` on this machine's own Ray, and `ray job submit` to a running head.

make bench NAME=submit

Goals: 25 s from `nev train`, 40 s from `ray job submit`, on two quiet cores.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console

from benchmarks import report
from benchmarks.contestants.head import BIN, Head, job_head
from benchmarks.contestants.processes import BenchmarkFailed
from nev.cluster.session import connect
from nev.common.cli import make_command, report_errors
from nev.config.data import Columns, DataSet
from nev.config.model import Text
from nev.data.prepare.synthetic import write_synthetic
from nev.embed.captions import embed_captions

ROOT = Path(__file__).parent.parent
TRAIN_GOAL, JOB_GOAL = 25.0, 40.0
LIMIT_S = 300
# A part ends when a process of that name is there, or when the log has that text.
PROCESSES = {"controller": "ray::TrainController", "workers": "ray::RayTrainWorker"}
NOTES = (
    "The quickstart's model on its drawn pictures, whose captions are embedded; two workers. train: `nev train`, which starts a "
    "Ray of this machine. submit: `ray job submit --working-dir .` to a head that runs already.",
    "Parts, each from the end of the one before: first_line: until nev has read and checked everything and prints what it trains "
    "(for train that is with Ray's start; for submit with the upload). controller: until Ray Train's controller is there. "
    "workers: until the training processes are there. first_step: until step 1 is printed; in it the processes import torch and "
    "meet, the model is built, and the first blocks are decoded.",
)


def main(
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    results: Annotated[Path, typer.Option(help="Folder of submit.json.", show_default="benchmarks/results")] = (
        report.RESULTS
    ),
) -> None:
    """Measure the time to the first step; writes benchmarks/results/submit.json."""
    console = Console()
    with report_errors(), tempfile.TemporaryDirectory(prefix="nev-bench-") as name:
        folder = Path(name)
        pictures = folder / "pictures"
        write_synthetic(pictures, train=2000, val=256, seed=0)
        connect()
        embed_captions([DataSet(str(pictures / split), Columns()) for split in ("train", "val")], Text(), console)
        import ray

        ray.shutdown()
        figures: dict[str, list[float]] = {}
        with job_head() as head:
            for number in range(repetitions):
                for way, start in (("train", train_command), ("submit", submit_command)):
                    output = folder / f"{way}-{number}"
                    parts = time_parts(start(pictures, output, head), head.env, output)
                    for part, seconds in parts.items():
                        figures.setdefault(f"{way}_{part}_s", []).append(seconds)
                    console.print(f"round {number + 1}/{repetitions}  {way}  {parts}", highlight=False)
        report.write(
            "submit",
            report.this_command(),
            figures,
            {},
            NOTES,
            folder=results,
            console=console,
            goals={
                "train_to_first_step_s": report.Goal(TRAIN_GOAL, at_most=True),
                "submit_to_first_step_s": report.Goal(JOB_GOAL, at_most=True),
            },
        )


def settings(pictures: Path, output: Path) -> list[str]:
    """The options of a training of three steps without validation."""
    chosen = {
        "output": output,
        "data.train": pictures / "train",
        "data.val": pictures / "val",
        "eval.zero_shot.classes": pictures / "classes.txt",
        "train.steps": 3,
        "train.log_every": 1,
        "train.eval_every": "null",
        "train.checkpoint_every": 3,
        "optim.warmup_steps": 1,
    }
    return [part for key, value in chosen.items() for part in ("--set", f"{key}={value}")]


def train_command(pictures: Path, output: Path, head: Head) -> list[str]:
    """`nev train`."""
    config = str(ROOT / "configs/quickstart.yaml")
    return [sys.executable, str(ROOT / "pipelines/train.py"), "--config", config, *settings(pictures, output)]


def submit_command(pictures: Path, output: Path, head: Head) -> list[str]:
    """`ray job submit`."""
    job = ["python", "pipelines/train.py", "--config", "configs/quickstart.yaml", *settings(pictures, output)]
    return [str(BIN / "ray"), "job", "submit", "--address", head.address, "--working-dir", str(ROOT), "--", *job]


def time_parts(command: list[str], env: dict[str, str], output: Path) -> dict[str, float]:
    """Run a command to its end, and return the seconds of each part of its way to the first step. Raises BenchmarkFailed."""
    output.mkdir()
    log = output / "log.txt"
    before = set(psutil.pids())
    ends: dict[str, float] = {}
    begin = time.perf_counter()
    with log.open("wb") as file, subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file) as process:
        for part, there in conditions(log, before).items():
            while not there():
                if process.poll() or time.perf_counter() - begin > LIMIT_S:
                    process.kill()
                    raise BenchmarkFailed(f"no {part}: {log.read_text()}")
                time.sleep(0.02)
            ends[part] = time.perf_counter() - begin
        process.wait(LIMIT_S)
    parts = list(ends)
    lengths = {part: ends[part] - ends.get(previous, 0.0) for previous, part in zip(["", *parts], parts, strict=False)}
    return {"to_first_step": ends["first_step"], **{part: round(seconds, 2) for part, seconds in lengths.items()}}


def conditions(log: Path, before: set[int]) -> dict[str, Callable[[], bool]]:
    """What ends each part, in their order. before: processes that are not the command's."""

    def there(name: str) -> bool:
        return any(name in title for title in titles(before))

    return {
        "first_line": lambda: " rows, " in log.read_text() or there(PROCESSES["controller"]),
        "controller": lambda: there(PROCESSES["controller"]),
        "workers": lambda: there(PROCESSES["workers"]),
        "first_step": lambda: "step 1/" in log.read_text(),
    }


def titles(before: set[int]) -> Iterator[str]:
    """The names by which new processes of this user call themselves."""
    for pid in set(psutil.pids()) - before:
        try:
            yield "".join(psutil.Process(pid).cmdline())
        except psutil.NoSuchProcess:
            continue


app = make_command(main, "make bench NAME=submit")

if __name__ == "__main__":
    app()
