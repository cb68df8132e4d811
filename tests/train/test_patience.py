"""Early stop: validations that do not improve are counted, through restarts, and the run ends well."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from nev.config.base import ConfigError
from nev.config.experiment import Eval, Experiment
from nev.runs.manifest import latest_checkpoint, read_manifest
from nev.runs.metrics_log import MetricPoint, read_points
from nev.train.driver.early_stopping import EarlyStopping
from nev.train.experiment import run_experiment

Make = Callable[..., Experiment]
METRIC = "zero_shot/top1"


@given(st.lists(st.integers(0, 4), max_size=12), st.integers(1, 4))
def test_over_as_soon_as_so_many_in_a_row_do_not_improve(scores: list[int], patience: int) -> None:
    found = EarlyStopping(Eval(best=METRIC, patience=patience))
    for step, score in enumerate(scores):
        found.update(step, {METRIC: float(score)})
    best_at = scores.index(max(scores)) if scores else 0
    assert found.should_stop == (len(scores) - 1 - best_at >= patience)


def test_a_step_that_is_repeated_counts_once_and_a_journal_counts() -> None:
    found = EarlyStopping(Eval(best=METRIC, patience=2))
    found.restore(
        [MetricPoint(10, 0, {METRIC: 0.5}), MetricPoint(20, 0, {METRIC: 0.4}), MetricPoint(20, 0, {"loss": 1.0})]
    )
    found.update(20, {METRIC: 0.4})
    assert not found.should_stop
    found.update(30, {METRIC: 0.5})
    assert found.should_stop
    assert "best is 0.5, at step 30" in str(found)


def test_without_patience_it_is_never_over(tiny: Make) -> None:
    found = EarlyStopping(Eval(best=METRIC))
    found.restore([MetricPoint(step, 0, {METRIC: 0.1}) for step in range(50)])
    assert not found.should_stop
    with pytest.raises(ConfigError, match="patience needs `best`"):
        tiny(eval__best=None, eval__patience=3)


@pytest.mark.ray
def test_a_run_ends_early_and_stays_ended(ray_cluster: None, tiny: Make, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    config = tiny(name="early", optim__lr=1e-12, train__steps=4000, train__eval_every=4, eval__patience=3)
    console = Console(file=io.StringIO(), width=200)
    summary = run_experiment(config, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "zero_shot/top1 has not improved for 3 validations" in shown
    run = MlflowClient(tracking_uri=summary.tracking_uri).get_run(summary.mlflow_run_id)
    assert run.info.status == "FINISHED"
    folder = str(tmp_path / "runs/early")
    ended = read_manifest(str(latest_checkpoint(folder)))["step"]
    assert 16 <= ended < 4000
    validated = {point.step for point in read_points(folder, ended) if METRIC in point.metrics}
    assert {4, 8, 12, 16} <= validated
    assert read_manifest(summary.checkpoint)["metrics"][METRIC] == summary.metrics[METRIC]

    said = Console(file=io.StringIO(), width=200)
    again = run_experiment(config, said)
    assert "has ended early (--set eval.patience=null trains on)" in said.file.getvalue()  # type: ignore[attr-defined]
    assert again.checkpoint == summary.checkpoint
    assert read_manifest(str(latest_checkpoint(folder)))["step"] == ended
