"""A real sweep on Ray Tune whose arms fail and end early; the suite and the MLflow runs of one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from helpers.sweeps import read_runs, sweep
from mlflow import MlflowClient
from PIL import Image
from ray.util import placement_group_table
from rich.console import Console

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.runs.tracking import open_run
from nev.storage.files import filesystem
from nev.sweep.mlflow_runs import open_parent, publish
from nev.sweep.report import read_sweep
from nev.sweep.results import Outcome, TrialResult
from nev.sweep.run import run_sweep
from nev.sweep.suite_data import read_suite

if TYPE_CHECKING:
    from helpers.s3_server import Proxy

ROOT = Path(__file__).parents[2]


def test_a_suite_without_its_data_is_refused_before_training(
    base: str, tmp_path: Path, tiny: Callable[..., Experiment]
) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump({**suite_of_colours(tmp_path / "colours"), "root": str(tmp_path)}))
    wanted = sweep(base, suite=str(suite), metrics=["colours/top1"])
    known = read_suite(wanted, tiny())
    assert known == read_suite(wanted, tiny()), "the same at every start"
    shutil.rmtree(tmp_path / "colours")
    with pytest.raises(ConfigError, match=r"cannot score colours: .*colours"):
        read_suite(wanted, tiny())
    other = read_suite(sweep(base, suite=str(suite)), tiny())
    assert other.digest != known.digest, "no metric needs it, and what was scored there counts no more"


def test_a_run_that_mlflow_lacks_hides_no_other(base: str, tmp_path: Path, tiny: Callable[..., Experiment]) -> None:
    uri, wanted = f"sqlite:///{tmp_path}/mlflow.db", sweep(base)
    parent = open_parent(wanted, "definition", tiny(), uri)
    child = open_run(uri, "nev", "trial", tiny(), {}, str(tmp_path))
    arm = (("train (batch)", "32"),)
    made = {"arm": arm, "metrics": {"zero_shot/top1": 0.5}, "samples": 640, "seconds": 1.0}
    lost = TrialResult(name="lost", seed=0, run_id="0" * 32, **made)
    kept = TrialResult(name="kept", seed=1, run_id=child.run_id, **made)
    said = publish(Outcome(wanted, [lost, kept], {}), parent, [])
    assert said.startswith("lost: ")
    assert "kept" not in said
    run = MlflowClient(tracking_uri=uri).get_run(child.run_id)
    assert run.data.metrics["zero_shot/top1"] == 0.5
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert run.data.tags["nev.arm.train _batch_"] == "32", "MLflow takes no brackets in a tag's name"
    assert open_parent(wanted, "definition", tiny(), uri).run_id == parent.run_id
    assert open_parent(wanted, "another", tiny(), uri).run_id != parent.run_id


def suite_of_colours(folder: Path) -> dict[str, Any]:
    """A suite of one task, whose pictures are written to `folder`."""
    for colour in ("red", "blue"):
        (folder / colour).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (32, 32), colour).save(folder / colour / f"{number}.png")
    source = {"format": "folder-classes", "input": "colours"}
    task = {"name": "colours", "kind": "zero_shot", "source": source, "templates": ["a {} picture"]}
    return {"about": "Two colours", "root": "${WHERE_COLOURS_LIE}", "tasks": [task]}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_arm_fails_and_one_is_ended_early_on_s3(
    s3: Proxy,
    ray_cluster: None,
    base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Two trials at a time on two CPUs, of which their workers reserve one. The wild arm makes room for the dull one, which
    comes to its rung after the good one. The suite's variable is set here alone, not in the cluster's processes.
    """
    monkeypatch.setenv("WHERE_COLOURS_LIE", str(tmp_path))
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump(suite_of_colours(tmp_path / "colours")))
    wild = {"optim.lr": 1e30, "optim.clip_norm": None}
    wanted = sweep(
        base,
        axes={"arm": {"good": {}, "wild": wild, "dull": {"optim.lr": 1e-9}}},
        overrides={"train.global_batch": 32, "train.eval_every": 10, "workers.cpus": 0.5, "guards.max_skipped": 0},
        seeds=[0],
        samples=640,
        metrics=["zero_shot/top1", "space/gap", "colours/top1"],
        suite=str(suite),
        concurrent=2,
        asha={"grace": 320, "reduction": 2},
    )
    places = ["output=s3://bucket/runs", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    done = run_sweep(wanted, places, Console(width=200))
    good, dull = done.outcome.results
    assert not done.outcome.all_finished
    assert not good.ended_early
    assert good.metrics.keys() >= {"zero_shot/top1_low", "space/gap", "mixed/own_image"}
    ((name, error),) = done.outcome.errors.items()
    assert name.startswith("sizes-arm_wild-seed_0-")
    assert "no finite loss" in error
    assert dull.ended_early
    assert dull.samples == 320
    printed = capfd.readouterr()
    assert "1 failed" in printed.out
    for chatter in ("run_trial", "Traceback", "tune.py", "─"):
        assert chatter not in printed.out + printed.err, chatter

    parents, children = read_runs(done.tracking_uri)
    assert len(parents) == 1
    assert sorted((run.data.tags.get("nev.arm.arm", ""), run.info.status) for run in children) == [
        ("dull", "KILLED"),
        ("good", "FINISHED"),
        ("wild", "FAILED"),
    ]
    held = [group["bundles"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
    assert not held, "room that is not given back"
    fs = filesystem("s3://bucket")[0]
    files = [path.rpartition("/")[2] for path in fs.find(parents[0].info.artifact_uri)]
    assert files == ["base.yaml", "sizes.json", "sizes.md", "sizes.png", "sizes.svg", "sizes.yaml"]
    assert read_sweep(done.tracking_uri, "sizes").results == done.outcome.results
    (place,) = [file for file in done.files if file.endswith(".md")]
    assert place.startswith("s3://bucket/runs/sizes-")
    said = fs.cat_file(place).decode()
    assert place.replace(".md", ".png") in done.files
    assert "**Failed** (1)" in said
    assert "**Ended early by ASHA** (1)" in said
