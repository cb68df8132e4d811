"""A real sweep on Ray Tune that is killed and goes on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers.sweeps import raw, read_runs
from mlflow import MlflowClient
from rich.console import Console

from nev.config.base import ConfigError
from nev.config.file import parse
from nev.runs.manifest import latest_checkpoint
from nev.sweep.config import Sweep
from nev.sweep.design import read_before
from nev.sweep.report import read_sweep
from nev.sweep.run import run_sweep

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_sweep_loses_and_repeats_nothing(ray_cluster: None, base: str, tmp_path: Path) -> None:
    """SIGKILL to the driver when one trial is finished and the other has a checkpoint; the same command continues."""
    settings = raw(base, axes={"vision.pool": ["mean"]}, concurrent=1, samples=64 * 40)
    file = tmp_path / "sizes.yaml"
    file.write_text(yaml.safe_dump(settings))
    wanted, overrides = parse(Sweep, settings), ["train.checkpoint_every=4"]
    runs = tmp_path / "runs"
    command = [sys.executable, str(ROOT / "pipelines/ablate.py"), "--config", str(file), "--set", *overrides]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 240
        while not (
            list(runs.glob("*-seed_0-*/result.json")) and list(runs.glob("*-seed_1-*/checkpoints/*/state.json"))
        ):
            assert driver.poll() is None, driver.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        driver.kill()
        driver.wait(30)
    (first,), (second,) = runs.glob("*-seed_0-*"), runs.glob("*-seed_1-*")
    assert int(str(latest_checkpoint(str(second)))[-8:]) < 40
    finished = (first / "result.json").stat().st_mtime_ns

    done = run_sweep(wanted, overrides, Console(quiet=True))
    assert done.outcome.all_finished
    assert (first / "result.json").stat().st_mtime_ns == finished, "what is finished is not done again"
    parents, children = read_runs(done.tracking_uri)
    assert len(parents) == 1
    assert [run.info.status for run in (*parents, *children)] == ["FINISHED"] * 3
    client = MlflowClient(tracking_uri=done.tracking_uri)
    for run in children:
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss")]
        assert steps == list(range(1, 41)), "no step is missing, and none is twice"
    again = run_sweep(wanted, overrides, Console(quiet=True))
    assert again.outcome.results == done.outcome.results
    assert len(read_runs(done.tracking_uri)[1]) == 2
    rows = json.loads(Path(next(name for name in done.files if name.endswith(".json"))).read_text())
    assert [row["name"] for row in rows] == [first.name, second.name]
    remembered = read_sweep(done.tracking_uri, "sizes")
    assert remembered.sweep == wanted
    assert remembered.results == done.outcome.results
    assert read_before(done.tracking_uri, wanted) is None, "one seed tells nothing of noise"
    with pytest.raises(ConfigError, match="no sweep is called 'other'"):
        read_sweep(done.tracking_uri, "other")
