"""Effective robustness (Taori et al. 2020, arXiv 2007.00644): what a model keeps beyond what its clean score promises."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import expit, logit

from nev.eval.suite.results import SuiteResult, TaskResult
from nev.eval.suite.schema import Suite

LEAST = 2  # models that a line needs
EDGE = 1e-3  # shares are kept so far from 0 and 1, whose logits are infinite

Point = tuple[float, float]  # of a model: its clean share, and its share under the shift


def effective_robustness(own: Point, others: Sequence[Point]) -> float | None:
    """The share under the shift less what the line through `others` (in logits) has for this clean share.

    None for fewer than two other models, and where all of theirs are equally good.
    """
    if len(others) < LEAST:
        return None
    clean, shifted = (logit(np.clip(column, EDGE, 1 - EDGE)) for column in np.array(others, np.float64).T)
    if np.ptp(clean) < 1e-9:
        return None
    slope, height = np.polyfit(clean, shifted, 1)
    promised = expit(slope * logit(np.clip(own[0], EDGE, 1 - EDGE)) + height)
    return float(own[1] - promised)


def add_effective_robustness(
    suite: Suite, results: list[TaskResult], others: Sequence[SuiteResult]
) -> list[TaskResult]:
    """Results with `drop` (clean less shifted) and `effective_robustness` against `others`, for tasks that are a shift."""
    shift_of = {task.name: task.shift_of for task in suite.tasks}
    found = []
    for result in results:
        own = point(result.name, results, shift_of)
        if own is None:
            found.append(result)
            continue
        line = [there for other in others if (there := point(result.name, other.tasks, shift_of))]
        beyond = effective_robustness(own, line)
        more = {"drop": own[0] - own[1]} | ({} if beyond is None else {"effective_robustness": beyond})
        found.append(result.model_copy(update={"metrics": {**result.metrics, **more}}))
    return found


def point(name: str, results: Sequence[TaskResult], shift_of: dict[str, str | None]) -> Point | None:
    """A model's clean and shifted share on a task: corruption has both; another shift is held against the task it is one of."""
    by_name = {result.name: result for result in results}
    shifted = by_name.get(name)
    if shifted is None or shifted.value is None:
        return None
    if shifted.metrics.keys() >= {"clean", "corrupted"}:
        return shifted.metrics["clean"], shifted.metrics["corrupted"]
    clean = by_name.get(shift_of.get(name) or "")
    return None if clean is None or clean.value is None else (clean.value, shifted.value)
