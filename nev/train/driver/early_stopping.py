"""Early stop: a run ends when the metric that its best checkpoint is chosen by has not improved for so many validations."""

from __future__ import annotations

from collections.abc import Iterable

from nev.config.experiment import Eval
from nev.runs.metrics_log import MetricPoint


class EarlyStopping:
    """What validations have given so far. A step that is repeated after a failure counts once."""

    def __init__(self, config: Eval) -> None:
        self._metric, self._patience = config.best, config.patience
        self._scores: dict[int, float] = {}

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Take the metric of a validation, where it is among these."""
        if self._metric in metrics:
            self._scores[step] = metrics[self._metric]

    def restore(self, points: Iterable[MetricPoint]) -> None:
        """Take those of a run's journal."""
        for point in points:
            self.update(point.step, point.metrics)

    @property
    def should_stop(self) -> bool:
        """Whether the last `eval.patience` validations all were no better than the best one before them."""
        if self._patience is None or len(self._scores) <= self._patience:
            return False
        scores = [self._scores[step] for step in sorted(self._scores)]
        return max(scores[-self._patience :]) <= max(scores[: -self._patience])

    def __str__(self) -> str:
        best = max(
            self._scores, key=lambda step: (self._scores[step], step)
        )  # the newest of equals, as `manifest.best_checkpoint` has it
        was = f"its best is {self._scores[best]:.4g}, at step {best:,}"
        return f"{self._metric} has not improved for {self._patience} validations; {was}"
