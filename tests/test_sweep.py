"""Ablations: the grid at a fixed number of samples, learning-rate rules, and a real sweep on Ray Tune."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from nev.config import Experiment
from nev.config_base import ConfigError
from nev.config_file import parse, read_yaml, to_yaml
from nev.sweep import plan_trials, run_sweep
from nev.sweep_config import Sweep

ROOT = Path(__file__).parent.parent


@pytest.fixture
def base(tiny: Callable[..., Experiment], tmp_path: Path) -> str:
    path = tmp_path / "base.yaml"
    path.write_text(to_yaml(tiny()))
    return str(path)


def sweep(base: str, **settings: object) -> Sweep:
    raw = {
        "name": "sizes",
        "base": base,
        "axes": {"train.global_batch": [32, 64, 128]},
        "seeds": [0, 1],
        "samples": 640,
        "metric": "zero_shot/top1",
    }
    return parse(Sweep, {**raw, **settings})


def test_every_trial_sees_the_same_number_of_samples(base: str) -> None:
    trials = plan_trials(sweep(base), [])
    assert len(trials) == 6
    assert {trial.experiment.train.samples for trial in trials} == {640}
    assert {trial.experiment.train.steps for trial in trials} == {None}
    assert [(t.experiment.train.global_batch, t.experiment.seed) for t in trials[:3]] == [(32, 0), (32, 1), (64, 0)]
    assert len({trial.experiment.name for trial in trials}) == 6


@pytest.mark.parametrize(("rule", "expected"), [("constant", 1e-3), ("linear", 2e-3), ("sqrt", 2**0.5 * 1e-3)])
def test_learning_rate_rule_against_the_base(base: str, rule: str, expected: float) -> None:
    trials = plan_trials(sweep(base, lr_rule=rule), [])
    largest = next(t.experiment for t in trials if t.experiment.train.global_batch == 128)
    assert largest.optim.lr == pytest.approx(expected)
    assert largest.optim.warmup_steps == round(5 / 2)


def test_an_axis_of_learning_rates_is_left_alone(base: str) -> None:
    trials = plan_trials(sweep(base, axes={"optim.lr": [0.1, 0.2], "train.global_batch": [128]}, lr_rule="linear"), [])
    assert sorted({trial.experiment.optim.lr for trial in trials}) == [0.1, 0.2]


def test_a_point_that_cannot_run_is_refused_before_the_first_trial(base: str) -> None:
    with pytest.raises(ConfigError, match=r"48.*must be a multiple"):
        plan_trials(sweep(base, axes={"train.global_batch": [32, 48]}), [])


def test_an_output_on_s3_is_refused(base: str) -> None:
    with pytest.raises(ConfigError, match=r"s3://bucket/runs'.* want a folder"):
        run_sweep(sweep(base), ["output=s3://bucket/runs"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sweeps_are_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert len(plan_trials(parse(Sweep, read_yaml(path), where=str(path)), [])) > 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_runs_with_parent_children_and_figure(ray_cluster: None, base: str) -> None:
    """Two trials at a time on two CPUs; the one whose trunk does not exist fails alone."""
    axes = {"train.global_batch": [32, 64], "vision.trunk": ["vit_tiny_patch16_224", "no_such_trunk"]}
    outcome = run_sweep(sweep(base, axes=axes, seeds=[0], samples=128, concurrent=2), [])
    assert [value is not None for value in outcome.values] == [True, False, True, False]
    assert "no_such_trunk" in (outcome.errors[1] or "")
    assert outcome.figure.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(outcome.figure.with_suffix(".json").read_text())
    assert [row["zero_shot/top1"] for row in rows] == outcome.values

    client = MlflowClient(tracking_uri=outcome.tracking_uri)
    runs = client.search_runs([client.get_experiment_by_name("nev").experiment_id])
    parents = [run for run in runs if run.data.tags.get("nev.kind") == "sweep"]
    assert len(parents) == 1
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    finished = [run for run in children if run.info.status == "FINISHED"]
    assert {run.data.params["train.global_batch"] for run in finished} == {"32", "64"}
    assert "sizes.png" in [artifact.path for artifact in client.list_artifacts(parents[0].info.run_id)]
