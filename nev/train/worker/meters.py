"""Counts and times of a run: bad rows, images a second, time by phase."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import NamedTuple

import torch

from nev.models.dual_encoder import DualEncoder
from nev.train.core.step import StepResult


class Totals:
    """Counts of pairs, stored on the device so that no step waits for the device.

    bad_rows: of the steps before this start.
    """

    def __init__(self, device: torch.device, bad_rows: int) -> None:
        self._pairs = torch.zeros((), dtype=torch.int64, device=device)
        self._expected = 0
        self._before = bad_rows

    def add(self, result: StepResult, global_batch: int) -> None:
        """Count the pairs of a step."""
        self._pairs += result.pairs
        self._expected += global_batch

    def bad_rows(self) -> int:
        """Rows that could not be used since the run's first step, over all ranks. It waits for the device."""
        return self._before + self._expected - int(self._pairs)

    def metrics(self, result: StepResult, model: DualEncoder, rate: float) -> dict[str, float]:
        """The metrics of a step, by name. Values of a skipped step that are not finite are left out. It waits for the GPU."""
        pairs = max(1, int(result.pairs))
        bias = {"logit_bias": float(model.bias.detach())} if hasattr(model, "bias") else {}
        metrics = bias | {
            "loss": float(result.loss),
            "learning_rate": rate,
            "logit_scale": float(model.log_scale.detach().exp()),
            "grad_norm": float(result.grad_norm),
            "batch_accuracy": int(result.correct) / pairs,
            "bad_rows": float(self.bad_rows()),
        }
        return {name: value for name, value in metrics.items() if math.isfinite(value)}


class Interval(NamedTuple):
    """What a rank has done since the export before.

    steps: done, and whole.
    images: of this rank's share of these steps.
    seconds: by phase; `data` and `compute` together are the time of the steps.
    """

    steps: int
    images: int
    seconds: dict[str, float]

    @property
    def step_seconds(self) -> float:
        """Time of the steps."""
        return self.seconds["data"] + self.seconds["compute"]


class StepClock:
    """Wall time of this rank by phase. A rate counts steps alone: validation, checkpoints and the profiler's work are pauses."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._start = time.perf_counter()
        self._waited = 0.0
        self._rows = 0
        self._interval = Interval(0, 0, {"data": 0.0, "compute": 0.0})

    def waiting(self) -> AbstractContextManager[None]:
        """A context whose time counts as waiting for data."""
        return _timed(self._add_wait)

    def paused(self, phase: str) -> AbstractContextManager[None]:
        """A context whose time belongs to a phase beside the steps."""
        return _timed(partial(self._skip, phase))

    def add_rows(self, rows: int) -> None:
        """Count rows of this rank's share of a step."""
        self._rows += rows

    def _add_wait(self, seconds: float) -> None:
        self._waited += seconds

    def _skip(self, phase: str, seconds: float) -> None:
        self._start += seconds
        self._interval.seconds[phase] = self._interval.seconds.get(phase, 0.0) + seconds

    def metrics(self, step: int, batch_rows: int) -> dict[str, float]:
        """`images_per_s`, over all ranks, and `data_wait_share`, the share of time that waited for data, since the last call.

        batch_rows: of a step, over all ranks.
        """
        now = time.perf_counter()
        elapsed = max(1e-9, now - self._start)
        rows, waited = (step - self._step) * batch_rows, min(self._waited, elapsed)
        steps, images, seconds = self._interval
        seconds["data"] += waited
        seconds["compute"] += elapsed - waited
        self._interval = Interval(steps + step - self._step, images + self._rows, seconds)
        self._step, self._start, self._waited, self._rows = step, now, 0.0, 0
        return {"images_per_s": rows / elapsed, "data_wait_share": waited / elapsed}

    def take(self) -> Interval:
        """The steps up to the last call of `metrics`, and the pauses up to now, since the last call of `take`."""
        taken, self._interval = self._interval, Interval(0, 0, {"data": 0.0, "compute": 0.0})
        return taken


@contextmanager
def _timed(add: Callable[[float], None]) -> Iterator[None]:
    begin = time.perf_counter()
    try:
        yield
    finally:
        add(time.perf_counter() - begin)
