"""An error while a worker builds its model or optimiser ends the run at once: workers that start again would meet it again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from helpers.gloo import on_ranks
from helpers.training import CPU, prepare_job
from rich.console import Console

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.paths import with_absolute_paths
from nev.models.precision import choose_precision
from nev.models.text import TextTower
from nev.train.driver.launcher import TrainingFailed
from nev.train.experiment import run_experiment
from nev.train.worker import state
from nev.train.worker.state import RankContext, load_model, make_train_state, on_every_rank

Make = Callable[..., Experiment]
QUIET = {"data__val": None, "eval": {}, "train__steps": 2}


def with_wrong_betas(config: Experiment) -> Experiment:
    """The schema refuses these; model_copy does not look."""
    return config.model_copy(update={"optim": config.optim.model_copy(update={"betas": (0.9, 1.5)})})


def fail(kind: type[Exception]) -> int:
    raise kind("no such layer\nand more")


def test_only_what_a_retry_may_mend_stays_what_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    assert on_every_rank(lambda: 3, "the model", 1) == 3
    with pytest.raises(ConfigError, match=r"^the model cannot be built from this config: KeyError: .no such layer"):
        on_every_rank(partial(fail, KeyError), "the model", 1)
    assert "Traceback" in capfd.readouterr().err
    for kind in (OSError, ConfigError):
        with pytest.raises(kind, match="no such layer"):
            on_every_rank(partial(fail, kind), "the model", 1)


def _build_on_ranks(rank: int) -> str:
    def make() -> int:
        return fail(ValueError) if rank == 1 else 7

    try:
        return str(on_every_rank(make, "the optimiser", 2))
    except ConfigError as error:
        return str(error)


def test_every_rank_has_the_error_of_one(tmp_path: Path) -> None:
    first, second = on_ranks(_build_on_ranks, 2, tmp_path)
    assert first == second
    assert first.startswith("the optimiser cannot be built from this config: ValueError: no such layer.")


def test_any_error_of_a_tower_or_an_optimiser_is_one(
    tiny: Make, text: TextTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = RankContext(0, 1, CPU, choose_precision("fp32", CPU))
    job = prepare_job(with_absolute_paths(with_wrong_betas(tiny(**QUIET))), text)
    with pytest.raises(ConfigError, match=r"^the optimiser cannot be built from this config: ValueError: Invalid beta"):
        make_train_state(load_model(job, ctx, 0), job, ctx)
    monkeypatch.setattr(state, "build_vision", lambda *given: fail(AttributeError))
    with pytest.raises(
        ConfigError, match=r"^the model cannot be built from this config: AttributeError: no such layer\."
    ):
        load_model(job, ctx, 0)


@pytest.mark.ray
def test_workers_are_not_started_again(ray_cluster: None, tiny: Make) -> None:
    with pytest.raises(
        TrainingFailed, match=r"^the optimiser cannot be built from this config: ValueError: "
    ) as caught:
        run_experiment(with_wrong_betas(tiny(**QUIET)), Console(quiet=True))
    assert caught.value.__cause__ is None, "a worker has reported it; Ray Train has seen no failure to retry"
