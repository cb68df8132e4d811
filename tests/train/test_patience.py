"""Early stop: validations that do not improve are counted, through restarts, and the run ends well."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nev.config.base import ConfigError
from nev.config.eval import Eval
from nev.config.experiment import Experiment
from nev.runs.metrics_log import MetricPoint
from nev.train.driver.early_stopping import EarlyStopping

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
