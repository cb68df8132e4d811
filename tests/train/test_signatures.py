"""Signs of failure: each is provoked, told once, and silent in a run that is well."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from helpers.training import blocks, load_train_state, prepare_job, train_reader
from rich.console import Console

from nev.config.experiment import Experiment
from nev.models.precision import choose_precision
from nev.models.text import TextTower
from nev.runs.manifest import latest_checkpoint, read_manifest
from nev.runs.metrics_log import read_points
from nev.train.driver import alerts as signatures
from nev.train.driver.alerts import BOUND_POINTS, FLAT_POINTS, FailureAlerts
from nev.train.experiment import run_experiment
from nev.train.messages import CheckpointSaved, Metrics, Note
from nev.train.worker.guards import Diverged
from nev.train.worker.loop import train
from nev.train.worker.state import RankContext

Make = Callable[..., Experiment]
GUESS = math.log(64)


def told(signs: FailureAlerts, points: list[dict[str, float]]) -> list[str]:
    return [alert.name for step, metrics in enumerate(points, start=6) for alert in signs.check(step, metrics)]


def test_a_run_that_is_well_is_not_disturbed(tiny: Make) -> None:
    points = [{"loss": GUESS - 0.03 * at, "logit_scale": 14.0 + at} for at in range(80)]
    well = {"space/anisotropy_images": 0.4, "zero_shot/top1": 0.5, "zero_shot/chance": 0.1, "space/text_drift": 0.0}
    assert told(FailureAlerts(tiny()), [*points, well]) == []


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("non_finite", [{"loss": math.nan}]),
        ("non_finite", [{"loss": GUESS, "skipped_steps": 1.0}]),
        ("flat_loss", [{"loss": GUESS}] * FLAT_POINTS),
        ("flat_loss", [{"loss": GUESS + 0.5}] * FLAT_POINTS),
        ("scale_at_bound", [{"logit_scale": 100.0}] * BOUND_POINTS),
        ("zero_shot_at_chance", [{"zero_shot/top1": 0.11, "zero_shot/chance": 0.1}]),
        ("zero_shot_at_chance", [{"zero_shot/top1": 0.55, "zero_shot/chance": 0.5}]),
        ("search_at_chance", [{"retrieval/text_to_image/r10": 0.01, "retrieval/text_to_image/r10_chance": 0.01}]),
        ("collapse", [{"space/anisotropy_images": 0.99}]),
        ("text_drift", [{"space/text_drift": 0.3}]),
    ],
)
def test_each_sign_is_told_once(tiny: Make, name: str, points: list[dict[str, float]]) -> None:
    assert told(FailureAlerts(tiny()), [*points, *points]) == [name]


def test_few_candidates_leave_no_room_for_half_as_much_again(tiny: Make) -> None:
    few = {"retrieval/text_to_image/r10": 1.0, "retrieval/text_to_image/r10_chance": 10 / 14}
    assert told(FailureAlerts(tiny()), [few, {"zero_shot/top1": 0.74, "zero_shot/chance": 0.5}]) == []


def test_no_number_is_told_in_the_warm_up_too(tiny: Make) -> None:
    assert told(FailureAlerts(tiny(optim__warmup_steps=1000)), [{"loss": math.inf}]) == ["non_finite"]


def test_one_loss_below_that_of_guessing_is_enough(tiny: Make) -> None:
    points = [{"loss": GUESS}] * (FLAT_POINTS - 1)
    assert told(FailureAlerts(tiny()), [{"loss": GUESS - 0.1}, *points]) == []


def test_a_flat_loss_in_the_warm_up_is_no_sign(tiny: Make) -> None:
    signs = FailureAlerts(tiny(optim__warmup_steps=1000))
    assert told(signs, [{"loss": GUESS}] * 900) == []


def test_a_first_validation_in_the_warm_up_is_no_sign(tiny: Make) -> None:
    early = {"zero_shot/top1": 0.1, "zero_shot/chance": 0.1, "space/anisotropy_images": 0.99}
    assert told(FailureAlerts(tiny(optim__warmup_steps=1000)), [early]) == []


def test_a_scale_that_was_at_its_bound_for_a_moment_is_no_sign(tiny: Make) -> None:
    moment = [{"logit_scale": 100.0}] * (BOUND_POINTS - 1)
    assert told(FailureAlerts(tiny()), [*moment, {"logit_scale": 80.0}, *moment]) == []
    assert told(FailureAlerts(tiny(loss__learn_scale=False)), [{"logit_scale": 100.0}] * 100) == []


def watched(config: Experiment, text: TextTower) -> set[str]:
    """The signs of a real run in this process, to its end or to where it gives up."""
    signs, seen = FailureAlerts(config), set()
    job = prepare_job(config, text)
    me = RankContext(0, 1, torch.device("cpu"), choose_precision("fp32", torch.device("cpu")))
    train_state, start = load_train_state(job, me)

    def report(message: Metrics | Note | CheckpointSaved) -> None:
        if isinstance(message, Metrics):
            seen.update(alert.name for alert in signs.check(*message))

    with suppress(Diverged):
        train(job, me, train_state, start, blocks(train_reader(config, text), job.plan, 0, job.stop_step), report)
    return seen


def test_a_run_whose_weights_are_thrown_away_has_a_loss_that_is_no_number(tiny: Make, text: TextTower) -> None:
    config = tiny(optim__warmup_steps=0, optim__clip_norm=None, guards__max_skipped=2, eval__best=None)
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 1e30})})
    assert "non_finite" in watched(config, text)


@pytest.mark.slow
@pytest.mark.parametrize(("lock", "drifts"), [("none", True), ("text", False)])
def test_a_text_tower_that_is_trained_hard_drifts(tiny: Make, text: TextTower, lock: str, drifts: bool) -> None:
    config = tiny(lock=lock, optim__lr=1e-2, optim__warmup_steps=0, train__steps=4, train__global_batch=32)
    assert ("text_drift" in watched(config, text)) == drifts


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_that_learns_nothing_says_so_bears_tags_ends_early_and_stays_ended(
    ray_cluster: None, tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learning rate of next to nothing: the loss stays flat, pictures stay alike, and search is at chance."""
    from mlflow import MlflowClient

    monkeypatch.setattr(signatures, "FLAT_POINTS", 8)
    monkeypatch.setattr(signatures, "BOUND_POINTS", 8)
    monkeypatch.setattr(signatures, "COLLAPSE", 0.3)  # to random weights these pictures are alike by 0.36
    settings = {"train__steps": 4000, "train__eval_every": 4, "eval__patience": 3}
    config = tiny(name="fails", optim__lr=1e-12, loss__max_scale=1 / 0.07, **settings)
    console = Console(file=io.StringIO(), width=200)
    summary = run_experiment(config, console)
    run = MlflowClient(tracking_uri=summary.tracking_uri).get_run(summary.mlflow_run_id)
    tags = run.data.tags
    assert {name.removeprefix("nev.alert.") for name in tags if name.startswith("nev.alert.")} == {
        *("flat_loss", "scale_at_bound", "collapse", "zero_shot_at_chance", "search_at_chance")
    }
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(tags[name] in shown for name in tags if name.startswith("nev.alert."))

    assert "zero_shot/top1 has not improved for 3 validations" in shown
    assert run.info.status == "FINISHED"
    folder = summary.checkpoint.rsplit("/checkpoints/", 1)[0]
    last = read_manifest(str(latest_checkpoint(folder)))["step"]
    assert 16 <= last < 4000
    validated = {point.step for point in read_points(folder, last) if "zero_shot/top1" in point.metrics}
    assert {4, 8, 12, 16} <= validated
    assert read_manifest(summary.checkpoint)["metrics"]["zero_shot/top1"] == summary.metrics["zero_shot/top1"]

    console = Console(file=io.StringIO(), width=200)
    again = run_experiment(config, console)
    assert "has ended early (--set eval.patience=null trains on)" in console.file.getvalue()  # type: ignore[attr-defined]
    assert again.checkpoint == summary.checkpoint
    assert read_manifest(str(latest_checkpoint(folder)))["step"] == last
