"""A run that things were killed under ends as an undisturbed one: the same weights, the same rows, one curve."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers.checkpoints import load_checkpoint
from helpers.gloo import on_ranks
from helpers.training import prepare_job, run_bare, train_reader

from benchmarks.contestants.processes import wait_for
from nev.config.experiment import Experiment
from nev.config.file import parse
from nev.data.block import BlockReader
from nev.runs.manifest import latest_checkpoint
from nev.runs.metrics_log import read_points
from nev.storage.files import upload
from nev.train.job import Job

from .machines import TRAINER, Machines, machines
from .runs import BATCH, STEPS, Result, Run, read_result, settings
from .servers import MlflowServer
from .table import FAULTS, Strike, restart_killed, stop_driver

if TYPE_CHECKING:
    from helpers.s3_server import Proxy

    from nev.models.text import TextTower

AWAY_S = 8.0

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Machines]:
    """Three nodes beside the head."""
    with machines() as own:
        yield own


@pytest.fixture(scope="module")
def straight(pictures: Path, text: TextTower, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What the run comes to where nothing happens to it: two processes train it without Ray."""
    folder = tmp_path_factory.mktemp("straight")
    config = parse(Experiment, settings(pictures, folder))
    job, reader = prepare_job(config, text), train_reader(config, text)
    ranks = on_ranks(functools.partial(train_rank, job=job, reader=reader, world=2), 2, folder)
    curve = {step: metrics["loss"] for step, metrics in ranks[0].items() if "loss" in metrics}
    return read_result(job.run, curve, runs=1)


def train_rank(rank: int, job: Job, reader: BlockReader, world: int) -> dict[int, dict[str, float]]:
    return run_bare(job, reader, rank=rank, world=world)


# At least two steps lie between one and the next.
STRUCK = ["decoder_killed", "block_node_killed", "s3_and_mlflow_away", "killed_twice", "driver_stopped", "spot_notice"]


@pytest.mark.timeout(900)
def test_a_run_survives_all_of_them(
    s3: Proxy, cluster: Machines, pictures: Path, tmp_path: Path, straight: Result
) -> None:
    """S3 holds the shards and the run, and MLflow is a server."""
    assert (straight.updates, straight.bad_rows, list(straight.curve)) == (STEPS, 0, list(range(1, STEPS + 1)))
    upload(pictures / "train", "s3://bucket/train")
    server = MlflowServer(tmp_path)

    def s3_and_mlflow_away(machines: Machines, run: Run) -> None:
        """S3 is back after a while; MLflow stays away."""
        server.stop()
        s3.rule = lambda method, path, span, before: "503"
        time.sleep(AWAY_S)
        s3.reset()

    def killed_twice(machines: Machines, run: Run) -> None:
        """SIGKILL to a node that trains, and to a training process that is started in its place. MLflow is away."""
        machines.kill(wait_for(lambda: machines.node_with(TRAINER), 60, "a node that trains"))
        restart_killed(machines, run)
        machines.add()
        server.start()

    def driver_stopped(machines: Machines, run: Run) -> None:
        """SIGTERM to the driver; the next driver finds MLflow."""
        stop_driver(run)
        server.wait()
        run.start()

    own = [s3_and_mlflow_away, killed_twice, driver_stopped]
    strikes: dict[str, Strike] = FAULTS | {strike.__name__: strike for strike in own}
    often = {"global_batch": BATCH, "steps": STEPS, "log_every": 1, "checkpoint_every": 2}
    config = settings(pictures, tmp_path, output="s3://bucket/runs", tracking={"uri": server.uri}, train=often)
    config["data"] = {**config["data"], "train": "s3://bucket/train"}  # type: ignore[dict-item]
    run = Run(config, tmp_path, cluster.address)
    try:
        server.start()
        server.wait()
        run.start()
        for name in STRUCK:
            run.wait_for_step(run.newest() + 2)
            strikes[name](cluster, run)
        assert run.finish() == 0, run.said()
        assert run.result() == straight, run.said()
    finally:
        run.end()
        server.stop()
    assert run.stopped == [143]  # SIGTERM: the current step is finished and saved, and the next driver begins there
    (saved,) = re.findall(r"step (\d+): a checkpoint is saved, and the same command continues", run.said())
    assert f"steps {saved} to {STEPS}" in run.said()


def test_workers_come_and_go(cluster: Machines, pictures: Path, tmp_path: Path) -> None:
    """As many workers as there are nodes, one on each: one, then two, then one again; no step is lost or counted twice."""
    elastic = {
        "min": 1,
        "max": 2,
        "memory": 700 * 2**20,
        "threads": 1,
        "max_failures": 5,
        "timeout_s": 60,
        "resize_s": 5,
    }
    # Three blocks a step: of two workers one has two.
    train = {"global_batch": 48, "steps": 10_000, "log_every": 1, "checkpoint_every": 2}  # not over before we are
    run = Run(settings(pictures, tmp_path, workers=elastic, train=train), tmp_path, cluster.address)

    def trainers(count: int) -> None:
        wait_for(lambda: len(cluster.processes(TRAINER)) == count, 90, f"{count} workers")
        run.wait_for_step(run.newest() + 4)

    for node in cluster.nodes()[1:]:
        cluster.kill(node)
    while not cluster.nodes():
        cluster.add()
    try:
        run.start()
        run.wait_for_step(2)
        trainers(1)
        cluster.add()
        trainers(2)
        cluster.kill(wait_for(lambda: cluster.node_with(TRAINER), 60, "a node that trains"))
        trainers(1)
    finally:
        run.end()
    state, _, moments, _ = load_checkpoint(latest_checkpoint(run.folder) or "")
    assert {int(value) for name, value in moments.items() if name.endswith("/step")} == {state.step}
    assert state.bad_rows == 0
    losses = [point.step for point in read_points(run.folder, state.step) if "loss" in point.metrics]
    assert sorted(losses) == list(range(1, state.step + 1))
