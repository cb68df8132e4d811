"""Effective robustness (Taori et al. 2020, arXiv 2007.00644): accuracy under a shift, beyond what the clean accuracy predicts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import expit, logit

from nev.eval.suite.results import SuiteResult, TaskResult
from nev.eval.suite.schema import Suite

LEAST = 2  # models that a line needs
EDGE = 1e-3  # shares are clipped to this distance from 0 and 1, whose logits are infinite

Point = tuple[float, float]  # of a model: clean share, share under the shift


def effective_robustness(model: Point, others: Sequence[Point]) -> float | None:
    """The share under the shift, less the share that a line through `others` (in logits) has at the same clean share.

    None for fewer than two other models, and where all clean shares are equal.
    """
    if len(others) < LEAST:
        return None
    clean, shifted = (logit(np.clip(column, EDGE, 1 - EDGE)) for column in np.array(others, np.float64).T)
    if np.ptp(clean) < 1e-9:
        return None
    slope, height = np.polyfit(clean, shifted, 1)
    predicted = expit(slope * logit(np.clip(model[0], EDGE, 1 - EDGE)) + height)
    return float(model[1] - predicted)


def add_effective_robustness(
    suite: Suite, results: list[TaskResult], others: Sequence[SuiteResult]
) -> list[TaskResult]:
    """Results where tasks that are a shift have `drop` (clean less shifted) and `effective_robustness` against `others`."""
    shift_of = {task.name: task.shift_of for task in suite.tasks}
    extended = []
    for result in results:
        model = read_point(result.name, results, shift_of)
        if model is None:
            extended.append(result)
            continue
        line = [point for other in others if (point := read_point(result.name, other.tasks, shift_of))]
        beyond = effective_robustness(model, line)
        more = {"drop": model[0] - model[1]} | ({} if beyond is None else {"effective_robustness": beyond})
        extended.append(result.model_copy(update={"metrics": {**result.metrics, **more}}))
    return extended


def read_point(name: str, results: Sequence[TaskResult], shift_of: dict[str, str | None]) -> Point | None:
    """The clean and the shifted share of a model on a task; None where either is absent.

    A robustness task has both shares. Any other shift is compared with the task that `shift_of` names.
    """
    by_name = {result.name: result for result in results}
    shifted = by_name.get(name)
    if shifted is None or shifted.value is None:
        return None
    if shifted.metrics.keys() >= {"clean", "corrupted"}:
        return shifted.metrics["clean"], shifted.metrics["corrupted"]
    clean = by_name.get(shift_of.get(name) or "")
    return None if clean is None or clean.value is None else (clean.value, shifted.value)
