"""Faults at random moments, for a bounded time: what runs survive, what is exact afterwards, and how long recovery takes.

make soak
make soak ARGS="--minutes 30 --seed 3"
"""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from mlflow import MlflowClient
from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.contestants.checkpointing import Spent, seconds_to_findings, steps_with_checkpoints
from benchmarks.contestants.processes import in_own_process, wait_for
from nev.common.cli import make_command, report_errors
from nev.runs.metrics_log import load_mlflow_run_id
from tests.faults.disk import small_disk
from tests.faults.machines import Machines, machines
from tests.faults.runs import BATCH, Result, Run, settings
from tests.faults.table import FAULTS

OVERHEAD_GOAL = 1.03
WAIT_GOAL = 0.05
READY_GOAL_S = 10.0
EVERY = 50  # steps between checkpoints, where their overhead is measured
A_RUN = 3  # faults
STEPS = 120  # some 40 s of training after 25 s of start
PAUSE_S = (1.0, 25.0)  # before each fault
RESTART = ("worker_killed", "starting_killed", "node_killed", "rank_stopped")  # faults after which a driver says LOST
RESTART_S = 45.0
LEFT = Path(tempfile.gettempdir()) / "nev-soak-failed"  # what the drivers of lost runs printed
LOST = "training continues from step"  # what a driver prints when processes are there again
NOTES = (
    "One run after another on a Ray cluster of a head and three nodes of one CPU, all on this machine; each is struck up to "
    "three times, at random moments from its start on. survived: strikes whose run ended well; weights_equal: and with weights, "
    "moments and loss curve of the undisturbed run, bit for bit. rows_lost, rows_repeated: by the steps that AdamW has counted.",
    "recovery: seconds from the strike to the next step that the run had not reached before, from MLflow's own clock; of it "
    "restart: until the processes are there again with the model (Ray's restart, imports, reading the checkpoint). All faults "
    "that end processes of training; medians.",
    f"checkpoint_overhead: time of steps of the quickstart's model with a checkpoint every {EVERY}, over that without (after a "
    "round that does not count). checkpoint_wait: what the loop waits for of the time that writing takes.",
    f"preflight_s: from the start of train.py until it has told all that is in the way of a run, of three different kinds; goal "
    f"at most {READY_GOAL_S:g} s.",
)


class Struck(NamedTuple):
    """One injection. recovery, restart: seconds, None where nothing was lost; the rest is of the run, which took several."""

    fault: str
    recovery: float | None
    restart: float | None
    finished: bool = False
    equal: bool = False
    lost: int = 0
    repeated: int = 0


def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long faults are injected.")] = 25.0,
    seed: Annotated[int, typer.Option(help="Of the moments and the order of the faults.")] = 0,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds of the checkpoints' cost and of the preflight.")] = 5,
    results: Annotated[
        Path, typer.Option(help="Folder of faults.json.", show_default="benchmarks/results")
    ] = report.RESULTS,
) -> None:
    """Inject faults at random moments; writes benchmarks/results/faults.json."""
    console = Console()
    with report_errors(), tempfile.TemporaryDirectory(prefix="nev-soak-") as name:
        folder = Path(name)
        pictures = drawn(folder / "pictures")
        checkpoints = cost_of_checkpoints(pictures, repetitions, console)
        ready = report.measure_interleaved({"preflight_s": lambda: seconds_to_findings(pictures)}, repetitions, console)
        with machines() as cluster:
            straight = undisturbed(cluster, pictures, folder)
            struck = soak(cluster, pictures, folder, straight, 60 * minutes, random.Random(seed), console)
        console.print(table(struck))
        figures = {name: [float(value)] for name, value in totals(struck).items()}
        for kind in ("recovery", "restart"):
            if values := [value for one in struck if (value := getattr(one, kind)) is not None]:
                figures[f"{kind}_s"] = values
        report.write(
            "faults",
            report.this_command(),
            figures | checkpoints | ready,
            {
                "checkpoint_overhead": report.Ratio("steps_with_checkpoints_s", "steps_s", OVERHEAD_GOAL, at_most=True),
                "checkpoint_wait": report.Ratio("checkpoint_wait_s", "checkpoint_write_s", WAIT_GOAL, at_most=True),
            },
            NOTES + tuple(line(name, [one for one in struck if one.fault == name]) for name in FAULTS),
            folder=results,
            console=console,
        )


def drawn(folder: Path) -> Path:
    """A set of pictures with the vectors of their captions."""
    from nev.config.data import Columns
    from nev.config.model import Text
    from nev.data.index import build_index
    from nev.data.prepare.synthetic import write_synthetic
    from nev.data.text_sidecar import sidecar_key, write_sidecar
    from nev.models.text import load_text

    write_synthetic(folder, train=1024, val=64, seed=0)
    tower = load_text(Text())
    index = build_index(str(folder / "train"), Columns())
    key = sidecar_key(tower.fingerprint, str(index.columns.caption))
    for shard in range(len(index.paths)):
        write_sidecar(index, shard, key, tower.width, tower.encode)
    return folder


def cost_of_checkpoints(pictures: Path, repetitions: int, console: Console) -> dict[str, list[float]]:
    """Seconds of steps without checkpoints and with, and with them of the waits and the writes."""
    spent: list[Spent] = []

    def without() -> float:
        return in_own_process(steps_with_checkpoints, pictures, None).total

    def with_them() -> float:
        spent.append(in_own_process(steps_with_checkpoints, pictures, EVERY))
        return spent[-1].total

    without()  # the first one finds caches and clocks cold
    steps = report.measure_interleaved(
        {"steps_s": without, "steps_with_checkpoints_s": with_them}, repetitions, console
    )
    return steps | {
        "checkpoint_wait_s": [one.waited for one in spent],
        "checkpoint_write_s": [one.written for one in spent],
    }


def undisturbed(cluster: Machines, pictures: Path, folder: Path) -> Result:
    """What a run comes to where nothing happens."""
    with begun(cluster, pictures, folder, "undisturbed") as run:
        if run.finish() != 0:
            raise RuntimeError(f"the undisturbed run failed:\n{run.said()}")
        return run.result()


@contextmanager
def begun(cluster: Machines, pictures: Path, folder: Path, name: str) -> Iterator[Run]:
    """A run that has been started, on a small disk of its own where this user may mount one; ended when the body is left."""
    own = folder / name
    own.mkdir()
    with small_disk(own / "disk"):
        train = {"global_batch": BATCH, "steps": STEPS, "log_every": 1, "checkpoint_every": 10}
        run = Run(settings(pictures, own / "disk", train=train), own, cluster.address)
        run.start()
        try:
            yield run
        finally:
            run.end()


def soak(
    cluster: Machines,
    pictures: Path,
    folder: Path,
    straight: Result,
    seconds: float,
    draw: random.Random,
    console: Console,
) -> list[Struck]:
    """Runs until the time is over, up to three faults in each."""
    end, found = time.monotonic() + seconds, []
    names: list[str] = []
    with small_disk(folder / "trial") as mounted:
        kinds = [name for name in FAULTS if mounted or name != "disk_full"]
    for number in itertools.count():
        if time.monotonic() > end:
            break
        if len(names) < A_RUN:
            names += draw.sample(kinds, len(kinds))
        while len(cluster.nodes()) < 3:
            cluster.add()
        with begun(cluster, pictures, folder, f"run-{number}") as run:
            struck = [
                one for name in names[:A_RUN] if (one := strike(cluster, run, name, draw.uniform(*PAUSE_S), console))
            ]
            done = judged(run, struck, straight)
        for one in done:
            names.remove(one.fault)
            console.print(line(one.fault, [one]), highlight=False)
        found += done
    return found


def strike(cluster: Machines, run: Run, name: str, pause: float, console: Console) -> Struck | None:
    """Strike a run after a pause of so many seconds. None where it was over before."""
    time.sleep(pause)
    if not run.alive() or run.newest() >= STEPS:
        return None
    before, at = len(run.said()), time.time()
    console.print(f"{run.file.parent.name} at step {run.newest()} or later: {name}", highlight=False)
    try:
        FAULTS[name](cluster, run)
    except (TimeoutError, RuntimeError, subprocess.SubprocessError):
        if not run.alive() or run.newest() >= STEPS:
            return None
        return Struck(
            name, None, None
        )  # what the fault waits for does not come: `judged` tells what becomes of the run
    again = seen(run, before) if name in RESTART else None
    return Struck(name, new_step(run, again) - at if again else None, again - at if again else None)


def judged(run: Run, struck: list[Struck], straight: Result) -> list[Struck]:
    """The strikes of a run with what it came to."""
    try:
        status: int | None = run.finish()
    except subprocess.TimeoutExpired:
        status = None
    if status != 0:
        if not struck:
            raise RuntimeError(f"a run failed that nothing had happened to:\n{run.said()}")
        LEFT.mkdir(exist_ok=True)
        shutil.copy(run.log, LEFT / f"{run.file.parent.name}.log")
        return struck
    result, exact = run.result(), (straight.weights, straight.moments, straight.curve)
    return [
        one._replace(
            finished=True,
            equal=(result.weights, result.moments, result.curve) == exact,
            lost=BATCH * max(0, STEPS - result.updates),
            repeated=BATCH * max(0, result.updates - STEPS),
        )
        for one in struck
    ]


def seen(run: Run, before: int) -> float | None:
    """When the driver said that processes are there again, or None where it does not within the time that a restart takes."""
    end = time.monotonic() + RESTART_S
    while run.alive() and time.monotonic() < end:
        if LOST in run.said()[before:]:
            return time.time()
        time.sleep(0.05)
    return None


def new_step(run: Run, again: float) -> float:
    """When MLflow got the first point of a step after `again`: it holds no step twice, so this one is new."""
    client, run_id = MlflowClient(tracking_uri=run.tracking_uri()), load_mlflow_run_id(run.folder) or ""

    def first() -> float | None:
        times = [point.timestamp / 1000 for point in client.get_metric_history(run_id, "loss")]
        return min((time for time in times if time > again), default=None)

    return float(wait_for(first, 120, "a new step"))


def totals(struck: list[Struck]) -> dict[str, int]:
    """The sums over all injections."""
    return {
        "injected": len(struck),
        "survived": sum(one.finished for one in struck),
        "weights_equal": sum(one.equal for one in struck),
        "rows_lost": sum(one.lost for one in struck),
        "rows_repeated": sum(one.repeated for one in struck),
    }


def line(name: str, struck: list[Struck]) -> str:
    """A fault's row in words."""
    found = totals(struck)
    times = sorted(one.recovery for one in struck if one.recovery is not None)
    recovery = f", recovery {times[len(times) // 2]:.1f} s" if times else ""
    return (
        f"{name}: injected {found['injected']}, finished {found['survived']}, weights equal {found['weights_equal']}, rows lost "
        f"{found['rows_lost']}, repeated {found['rows_repeated']}{recovery}"
    )


def table(struck: list[Struck]) -> Table:
    """The faults, one a row."""
    shown = Table(title="faults", title_justify="left")
    for column in ("fault", "injected", "finished", "weights equal", "rows lost", "rows repeated", "recovery s"):
        shown.add_column(column, justify="left" if column == "fault" else "right")
    for name in FAULTS:
        own = [one for one in struck if one.fault == name]
        found = totals(own)
        times = sorted(one.recovery for one in own if one.recovery is not None)
        shown.add_row(
            name,
            *(str(found[key]) for key in ("injected", "survived", "weights_equal", "rows_lost", "rows_repeated")),
            f"{times[len(times) // 2]:.1f}" if times else "",
        )
    return shown


app = make_command(main, "make soak")

if __name__ == "__main__":
    app()
