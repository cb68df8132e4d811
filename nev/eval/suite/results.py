"""The result of a suite: one record for each task, as JSON."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationError

from nev.config.base import ConfigError, Section
from nev.eval.metrics.intervals import Interval
from nev.eval.suite.schema import Suite, Task
from nev.storage.reading import read_bytes


class TaskResult(Section):
    """The score of a task.

    metric: name of the metric that the task is judged by.
    value: of that metric; None for a task that was not run.
    low, high: ends of the 95 % interval of `value`; None where no interval is computed.
    chance: score of guessing; None where it is not known.
    published: scores that others have published, by model.
    metrics: every number by name; shares are in [0, 1].
    table: rows of a finer result.
    images: pictures that were scored. bad: pictures that cannot be decoded. unmarked: pictures without label or caption.
    reason: why the task was not run.
    """

    name: str
    kind: str
    metric: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    published: dict[str, float] = Field(default={})
    metrics: dict[str, float] = Field(default={})
    table: tuple[dict[str, Any], ...] = ()
    images: int = 0
    bad: int = 0
    unmarked: int = 0
    reason: str | None = None


class SuiteResult(Section):
    """The tasks of a suite for one checkpoint.

    average: mean of the tasks' values; None where a task was not run, or the suite has no average.
    """

    suite: str
    about: str
    checkpoint: str
    model: str
    step: int
    average: float | None
    published: dict[str, float] = Field(default={})
    seconds: float
    tasks: tuple[TaskResult, ...]

    @property
    def not_run(self) -> list[str]:
        """The tasks without a score."""
        return [task.name for task in self.tasks if task.value is None]

    def flat(self) -> dict[str, float]:
        """Every number by 'suite/task/metric', as a tracker wants them."""
        return {
            f"{self.suite}/{task.name}/{name}": value for task in self.tasks for name, value in task.metrics.items()
        }


def load_result(location: str, suite: str) -> SuiteResult:
    """Read the JSON of an earlier `nev evaluate --suite`, here or on S3. Raises ConfigError for another file or suite."""
    content = read_bytes(location)
    if content is None:
        raise ConfigError(
            f"{location}: no such file. `nev evaluate --suite NAME` writes NAME-STEP.json in evaluation/ of the run's folder."
        )
    try:
        result = SuiteResult.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{location}: not a result of `nev evaluate --suite` ({where + ': ' if where else ''}{first['msg']})"
        ) from error
    if result.suite != suite:
        raise ConfigError(
            f"{location}: a result of the suite {result.suite!r}, which cannot be compared with the suite {suite!r}"
        )
    return result


def compute_average(suite: Suite, results: list[TaskResult]) -> float | None:
    """The mean of all tasks; None where the suite has no average, or a task was not run."""
    values = [result.value for result in results]
    return sum(map(float, values)) / len(values) if suite.average and None not in values else None  # type: ignore[arg-type]


def make_result(
    task: Task, metrics: dict[str, float], intervals: dict[str, Interval], chance: float | None, **more: Any
) -> TaskResult:
    """The result of a task that was run. more: further fields of TaskResult.

    Raises ConfigError where `metrics` lacks the metric that the task is judged by.
    """
    if task.judged_by not in metrics:
        raise ConfigError(f"{task.judged_by} is not known of this set, which has {', '.join(sorted(metrics))}")
    judged = intervals.get(task.judged_by)
    ends = {f"{name}_{end}": float(getattr(ci, end)) for name, ci in intervals.items() for end in ("low", "high")}
    return TaskResult(
        name=task.name,
        kind=task.kind,
        metric=task.judged_by,
        value=metrics[task.judged_by],
        low=judged.low if judged else None,
        high=judged.high if judged else None,
        chance=chance if task.chance is None else task.chance,
        published=task.published,
        metrics={**metrics, **ends},
        **more,
    )


def not_run(task: Task, reason: str) -> TaskResult:
    """The result of a task that cannot be run."""
    return TaskResult(
        name=task.name,
        kind=task.kind,
        metric=task.judged_by,
        chance=task.chance,
        published=task.published,
        reason=reason,
    )
