"""Validation beside training: the scores of the loop, on the same weights; no checkpoint is lost or waits for ever."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nev.runs.manifest import best_checkpoint, list_checkpoints, pending_validation, prune_checkpoints
from nev.runs.metrics_log import read_points
from nev.storage.files import StorageError
from nev.train.driver import validator
from nev.train.driver.validator import ValidationOutcome, Validator


def job(run: Path, every: int = 10) -> Any:
    return SimpleNamespace(run=str(run), validates=lambda step: step % every == 0)


def checkpoint(run: Path, step: int, metrics: dict[str, float] | None = None) -> Path:
    folder = run / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    from nev.runs.manifest import FORMAT

    (folder / "state.json").write_text(json.dumps({"format": FORMAT, "step": step, "metrics": metrics or {}}))
    return folder


def steps(locations: list[str]) -> list[int]:
    return [int(location.rsplit("-", 1)[1]) for location in locations]


def ended(found: Validator) -> list[ValidationOutcome]:
    """Everything that it has to say, when it has come to its end."""
    assert found.finished(60)
    return found.take_outcomes()


def test_what_is_written_is_scored_and_what_was_left_comes_first(tmp_path: Path) -> None:
    for step in (10, 15, 20):
        checkpoint(tmp_path, step)
    seen: list[int] = []

    def score(location: str) -> dict[str, float]:
        seen.append(int(location.rsplit("-", 1)[1]))
        return {"top1": seen[-1] / 100}

    with Validator(job(tmp_path), score) as found:
        checkpoint(tmp_path, 30)
        for step in (30, 35):
            found.add(step)
        done = ended(found)
    assert sorted(seen) == [10, 20, 30]
    assert {one.step: one.metrics for one in done} == {10: {"top1": 0.1}, 20: {"top1": 0.2}, 30: {"top1": 0.3}}
    points = [(point.step, point.metrics) for point in read_points(str(tmp_path), 20)]
    assert points == [(10, {"top1": 0.1}), (20, {"top1": 0.2})]
    assert pending_validation(str(tmp_path), job(tmp_path).validates) == []
    assert steps([str(best_checkpoint(str(tmp_path), "top1"))]) == [30]


def test_slow_validation_leaves_the_oldest_out_and_says_so(tmp_path: Path) -> None:
    begun, go_on, seen = threading.Event(), threading.Event(), []

    def score(location: str) -> dict[str, float]:
        seen.append(int(location.rsplit("-", 1)[1]))
        begun.set()
        assert go_on.wait(60)
        return {}

    with Validator(job(tmp_path), score) as found:
        for step in (10, 20, 30, 40, 50):
            checkpoint(tmp_path, step)
            found.add(step)
            assert begun.wait(60)
        go_on.set()
        problems = {one.step: one.problem for one in ended(found)}
    assert seen == [10, 40, 50]
    assert set(problems) == {10, 20, 30, 40, 50}
    assert "faster than validation" in str(problems[20])
    assert pending_validation(str(tmp_path), job(tmp_path).validates) == []


def test_what_no_try_can_mend_is_told_and_the_next_one_is_scored(tmp_path: Path) -> None:
    for step in (10, 20):
        checkpoint(tmp_path, step)

    def score(location: str) -> dict[str, float]:
        if location.endswith("10"):
            raise ValueError("images: 3 of 9 rows hold NaN")
        return {"top1": 1.0}

    with Validator(job(tmp_path), score) as found:
        bad, good = ended(found)
    assert bad.problem == "step 10: not validated (images: 3 of 9 rows hold NaN)"
    assert good.metrics == {"top1": 1.0}
    assert pending_validation(str(tmp_path), job(tmp_path).validates) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_is_not_taken_for_one_that_is_done(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10)
    with (
        Validator(job(tmp_path), lambda location: {}["absent"]) as found,
        pytest.raises(RuntimeError, match="has died"),
    ):
        found.finished(60)


@pytest.mark.parametrize("failures", [1, validator.TRIES])
def test_storage_that_fails_is_asked_again_at_last_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    monkeypatch.setattr(validator, "PAUSE_S", 0.01)
    checkpoint(tmp_path, 10)
    left = [StorageError("")] * failures

    def score(location: str) -> dict[str, float]:
        if left:
            raise left.pop()
        return {"top1": 1.0}

    with Validator(job(tmp_path), score) as found:
        (first,) = ended(found)
    again = pending_validation(str(tmp_path), job(tmp_path).validates)
    if failures < validator.TRIES:
        assert first.metrics == {"top1": 1.0}
        assert again == []
        return
    assert first.problem == "step 10: not validated (StorageError); the next start of the run tries again"
    assert steps(again) == [10]
    with Validator(job(tmp_path), score) as found:
        assert [one.metrics for one in ended(found)] == [{"top1": 1.0}]


def test_a_failed_checkpoint_is_left_out_before_a_newer_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoint 10 fails while 20 and 30 wait, and is queued behind both; 40 comes while 20 is scored."""
    monkeypatch.setattr(validator, "PAUSE_S", 0.01)
    queued, failed, go_on = threading.Event(), threading.Event(), threading.Event()
    seen: list[int] = []

    def score(location: str) -> dict[str, float]:
        seen.append(int(location.rsplit("-", 1)[1]))
        if seen == [10]:
            assert queued.wait(60)
            raise StorageError("")
        if seen[-1] == 20:
            failed.set()
            assert go_on.wait(60)
        return {"top1": 1.0}

    for step in (10, 20):
        checkpoint(tmp_path, step)
    with Validator(job(tmp_path), score) as found:
        for step in (30, 40):
            checkpoint(tmp_path, step)
        while not seen:
            time.sleep(0.01)
        found.add(30)
        queued.set()
        assert failed.wait(60)
        found.add(40)
        go_on.set()
        outcomes = ended(found)
    assert seen == [10, 20, 30, 40]
    assert {one.step for one in outcomes if one.metrics} == {20, 30, 40}
    assert [one.step for one in outcomes if "faster than validation" in str(one.problem)] == [10]


def test_one_that_is_left_writes_nothing_more(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()
    for step in (10, 20):
        checkpoint(tmp_path, step)

    def score(location: str) -> dict[str, float]:
        begun.set()
        assert go_on.wait(60)
        return {"top1": 1.0}

    def stopped_in_the_middle() -> None:
        with Validator(job(tmp_path), score) as found:
            assert begun.wait(60)
            left.append(found)
            raise KeyboardInterrupt

    left: list[Validator] = []
    with pytest.raises(KeyboardInterrupt):
        stopped_in_the_middle()
    go_on.set()
    assert left[0].finished(60)
    assert left[0].take_outcomes() == []
    assert steps(pending_validation(str(tmp_path), job(tmp_path).validates)) == [10, 20]


def test_a_checkpoint_that_is_gone_leaves_no_trace(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 10)

    def score(location: str) -> dict[str, float]:
        shutil.rmtree(folder)
        return {"top1": 1.0}

    with Validator(job(tmp_path), score) as found:
        ended(found)
    assert not folder.exists()


def test_no_checkpoint_is_removed_before_it_is_validated(tmp_path: Path) -> None:
    for step in (10, 15, 20, 25, 30):
        checkpoint(tmp_path, step)
    validates = job(tmp_path).validates
    (tmp_path / "checkpoints/step-00000010/validation.json").write_text('{"top1": 0.9}')
    prune_checkpoints(str(tmp_path), 1, None, validates)
    assert steps(list_checkpoints(str(tmp_path))) == [20, 30]
    (tmp_path / "checkpoints/step-00000020/validation.json").write_text('{"top1": 0.9}')
    (tmp_path / "checkpoints/step-00000030/validation.json").write_text('{"top1": 0.1}')
    checkpoint(tmp_path, 35)
    prune_checkpoints(str(tmp_path), 1, "top1", validates)
    assert steps(list_checkpoints(str(tmp_path))) == [20, 35]
