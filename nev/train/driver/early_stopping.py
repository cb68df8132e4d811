"""Early stopping: a run ends when `eval.best` has not improved for `eval.patience` validations."""

from __future__ import annotations

from collections.abc import Iterable

from nev.config.eval import Eval
from nev.runs.metrics_log import MetricPoint


class EarlyStopping:
    """The scores of a run's validations. A step that is repeated after a failure counts once."""

    def __init__(self, config: Eval) -> None:
        self._metric, self._patience = config.best, config.patience
        self._scores: dict[int, float] = {}

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Take the score of a validation. Metrics without `eval.best` change nothing."""
        if self._metric in metrics:
            self._scores[step] = metrics[self._metric]

    def restore(self, points: Iterable[MetricPoint]) -> None:
        """Take the scores in a run's metrics log."""
        for point in points:
            self.update(point.step, point.metrics)

    @property
    def should_stop(self) -> bool:
        """Whether none of the last `eval.patience` validations was better than the best validation before them."""
        if self._patience is None or len(self._scores) <= self._patience:
            return False
        scores = [self._scores[step] for step in sorted(self._scores)]
        return max(scores[-self._patience :]) <= max(scores[: -self._patience])

    def __str__(self) -> str:
        # Of equal scores the newest, as `manifest.best_checkpoint` chooses.
        best = max(self._scores, key=lambda step: (self._scores[step], step))
        was = f"its best is {self._scores[best]:.4g}, at step {best:,}"
        return f"{self._metric} has not improved for {self._patience} validations; {was}"
