"""A run that things were killed under ends as an undisturbed one: the same weights, the same rows, one curve."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers.checkpoints import load_checkpoint

from nev.runs.manifest import latest_checkpoint
from nev.runs.metrics_log import read_points
from nev.storage.files import upload

from .disk import small_disk
from .machines import TRAINER, Machines, machines, wait_for
from .runs import BATCH, STEPS, Result, Run, settings
from .servers import MlflowServer
from .table import FAULTS

if TYPE_CHECKING:
    from helpers.s3_server import Proxy

AWAY_S = 8.0

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Machines]:
    """Three nodes beside the head."""
    with machines() as own:
        yield own


@pytest.fixture(scope="module")
def straight(cluster: Machines, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What the run comes to where nothing happens to it."""
    folder = tmp_path_factory.mktemp("straight")
    run = Run(settings(pictures, folder), folder, cluster.address)
    run.start()
    assert run.finish() == 0, run.said()
    return run.result()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path | None]:
    """A small disk to fill, None where this user may not mount one."""
    with small_disk(tmp_path / "disk") as mounted:
        yield tmp_path / "disk" if mounted else None


def test_the_undisturbed_run_is_whole(straight: Result) -> None:
    assert (straight.updates, straight.bad_rows, straight.runs) == (STEPS, 0, 1)
    assert list(straight.curve) == list(range(1, STEPS + 1))


# One after another, two steps between. What training does not wait for comes first, while there are steps left.
ALL = [
    *("decoder_killed", "block_node_killed", "starting_killed", "node_killed", "driver_stopped"),
    *("spot_notice", "disk_full", "rank_stopped", "driver_killed"),
]


@pytest.mark.timeout(900)
def test_a_run_survives_all_of_them(
    cluster: Machines, pictures: Path, tmp_path: Path, disk: Path | None, straight: Result
) -> None:
    names = ALL if disk else [name for name in ALL if name != "disk_full"]  # it takes root to mount one
    often = {"global_batch": BATCH, "steps": STEPS, "log_every": 1, "checkpoint_every": 2}
    run = Run(settings(pictures, disk or tmp_path, train=often), tmp_path, cluster.address)
    try:
        run.start()
        for name in names:
            run.wait_for_step(run.newest() + 2)
            FAULTS[name](cluster, run)
        assert run.finish() == 0, run.said()
    finally:
        run.end()
    assert run.result() == straight, run.said()
    assert run.stopped == [143]  # SIGTERM: it has kept the step that was under way, and the next driver begins there
    (saved,) = re.findall(r"step (\d+): a checkpoint is saved, and the same command continues", run.said())
    assert f"steps {saved} to {STEPS}" in run.said()


def test_a_run_waits_for_s3_and_mlflow(
    s3: Proxy, cluster: Machines, pictures: Path, tmp_path: Path, straight: Result
) -> None:
    """S3 holds the shards and the run; both it and MLflow are away for a while, one after the other and together."""
    upload(pictures / "train", "s3://bucket/train")
    server = MlflowServer(tmp_path)
    config = settings(pictures, tmp_path, output="s3://bucket/runs", tracking={"uri": server.uri})
    config["data"] = {**config["data"], "train": "s3://bucket/train"}  # type: ignore[dict-item]
    run = Run(config, tmp_path, cluster.address)
    try:
        server.start()
        run.start()
        run.wait_for_step(10)
        server.stop()
        s3.rule = lambda method, path, span, before: "503"
        time.sleep(AWAY_S)
        s3.reset()
        run.wait_for_step(20)
        server.start()
        assert run.finish() == 0, run.said()
        assert run.result() == straight, run.said()
    finally:
        run.end()
        server.stop()


def test_workers_come_and_go(cluster: Machines, pictures: Path, tmp_path: Path) -> None:
    """As many workers as there are nodes, one on each: three, then two, then three again; no step is lost or counted twice."""
    elastic = {
        "min": 1,
        "max": 3,
        "memory": 700 * 2**20,
        "threads": 1,
        "max_failures": 5,
        "timeout_s": 60,
        "resize_s": 5,
    }
    train = {"global_batch": BATCH, "steps": 10_000, "log_every": 1, "checkpoint_every": 10}  # not over before we are
    run = Run(settings(pictures, tmp_path, workers=elastic, train=train), tmp_path, cluster.address)

    def trainers(count: int) -> None:
        wait_for(lambda: len(cluster.processes(TRAINER)) == count, 90, f"{count} workers")
        run.wait_for_step(run.newest() + 10)

    try:
        run.start()
        run.wait_for_step(10)
        trainers(3)
        cluster.kill(wait_for(lambda: cluster.node_with(TRAINER), 60, "a node that trains"))
        trainers(2)
        cluster.add()
        trainers(3)
    finally:
        run.end()
    state, _, moments, _ = load_checkpoint(latest_checkpoint(run.folder) or "")
    assert {int(value) for name, value in moments.items() if name.endswith("/step")} == {state.step}
    assert state.bad_rows == 0
    losses = [point.step for point in read_points(run.folder, state.step) if "loss" in point.metrics]
    assert sorted(losses) == list(range(1, state.step + 1))
