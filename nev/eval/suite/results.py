"""What a suite came to: one record a task, as JSON."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationError

from nev.config.base import ConfigError, Section
from nev.eval.metrics.intervals import Interval
from nev.eval.suite.schema import Suite, Task
from nev.storage.reading import read_bytes


class TaskResult(Section):
    """A task's score. `value` is None where it was not run, and `reason` says why.

    `metric` is what `value` is; `metrics` are all numbers, shares in [0, 1]; `low`, `high`: the ends of the 95 % interval of
    `value`, None where there is none; `table`: rows of a finer result; `images`: those that were scored; `bad`: those that cannot
    be decoded; `unmarked`: those without a label or caption.
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
    """All tasks of a suite for one checkpoint. `average`: of the tasks' values, None where one was not run or none is wanted."""

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
    """What an earlier `evaluate.py --suite` wrote as JSON, here or on S3. Raises ConfigError where it is no such file, or is of
    another suite.
    """
    content = read_bytes(location)
    if content is None:
        raise ConfigError(
            f"{location}: no such file. evaluate.py --suite NAME writes NAME-STEP.json in the run's folder/evaluation."
        )
    try:
        result = SuiteResult.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{location}: not what evaluate.py --suite writes ({where + ': ' if where else ''}{first['msg']})"
        ) from error
    if result.suite != suite:
        raise ConfigError(
            f"{location}: of the suite {result.suite!r}, and this is {suite!r}: they have nothing to compare"
        )
    return result


def compute_average(suite: Suite, results: list[TaskResult]) -> float | None:
    """The mean of all tasks, where the suite has one: no task is left out of it."""
    values = [result.value for result in results]
    return sum(map(float, values)) / len(values) if suite.average and None not in values else None  # type: ignore[arg-type]


def make_result(
    task: Task, metrics: dict[str, float], sure: dict[str, Interval], chance: float | None, **more: Any
) -> TaskResult:
    """The record of a task that was run. Raises ConfigError where what it is judged by is not among the metrics."""
    if task.judged_by not in metrics:
        raise ConfigError(f"{task.judged_by} is not known of this set, which has {', '.join(sorted(metrics))}")
    own = sure.get(task.judged_by)
    ends = {f"{name}_{end}": float(getattr(one, end)) for name, one in sure.items() for end in ("low", "high")}
    return TaskResult(
        name=task.name,
        kind=task.kind,
        metric=task.judged_by,
        value=metrics[task.judged_by],
        low=own.low if own else None,
        high=own.high if own else None,
        chance=chance if task.chance is None else task.chance,
        published=task.published,
        metrics={**metrics, **ends},
        **more,
    )


def not_run(task: Task, reason: str) -> TaskResult:
    """The record of a task that cannot be run here."""
    return TaskResult(
        name=task.name,
        kind=task.kind,
        metric=task.judged_by,
        chance=task.chance,
        published=task.published,
        reason=reason,
    )
