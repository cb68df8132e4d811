"""SIGTERM before and after training raises Stopped, by which the MLflow run is KILLED (test_driver) and the mailbox is closed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from nev.common.signals import Stopped
from nev.config.experiment import Experiment
from nev.models.text import TextTower
from nev.train import experiment


@pytest.mark.parametrize("phase", ["prepare", "check_object_store", "print_start", "summarise_run"])
def test_sigterm_outside_of_training(
    phase: str, tiny: Callable[..., Experiment], text: TextTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[str] = []

    @contextmanager
    def noted(name: str) -> Iterator[Any]:
        try:
            yield SimpleNamespace(tracker=None)
        except Stopped:
            ends.append(name)
            raise

    def terminated(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("SIGTERM did not end the run")

    monkeypatch.setattr(experiment, "connecting", nullcontext)
    monkeypatch.setattr(experiment, "open_mailbox", lambda run: noted("mailbox"))
    monkeypatch.setattr(experiment, "open_tracking", lambda *_: noted("MLflow"))
    for name in ("connect", "check_object_store", "train_and_validate", "print_start"):
        monkeypatch.setattr(experiment, name, lambda *_: None)
    monkeypatch.setattr(experiment, phase, terminated)
    before = signal.signal(signal.SIGTERM, lambda *_: ends.append("the process"))
    try:
        with pytest.raises(Stopped):
            experiment.run_experiment(tiny(), Console(quiet=True))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ends == {"summarise_run": ["MLflow", "mailbox"], "print_start": ["mailbox"]}.get(phase, [])
