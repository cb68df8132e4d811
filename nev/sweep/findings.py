"""What a sweep has found, as text: a table of means with intervals, and sentences with numbers in them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from nev.sweep.figures import label_of, number
from nev.sweep.results import Outcome
from nev.sweep.statistics import Difference, Estimate, differences, estimate, fit, steps_up
from nev.sweep.trials import Arm, reference_of

NOTHING = "not distinguishable at this budget"


def findings(outcome: Outcome) -> str:
    """Markdown: the question, what was tried, the table, and the sentences."""
    sweep = outcome.sweep
    arms, seeds = len(outcome.arms), len(sweep.seeds)
    counts = f"{arms * seeds} trials: {arms} arms, {seeds} seed" + "s" * (seeds > 1)
    head = [f"# {sweep.name}", sweep.question, f"{counts}, {sweep.samples:,} samples seen by each; base {sweep.base}."]
    parts = [part for part in head if part]
    measured = [metric for metric in sweep.metrics if outcome.values(metric)]
    if measured:
        parts.append("\n".join(table(outcome, measured)))
        parts.append(_how(outcome))
    for metric in measured:
        parts.append("\n".join([f"**{metric}**", "", *(f"- {line}" for line in sentences(outcome, metric))]))
    lost = [f"- {name}: {error}" for name, error in outcome.errors.items()]
    if lost:
        parts.append("\n".join([f"**Failed** ({len(lost)}); the same command tries them again", "", *lost]))
    early = [
        f"- {result.name}: {_share(sweep.metrics[0], result.metrics.get(sweep.metrics[0]))} at {result.samples:,} samples"
        for result in outcome.results
        if result.ended_early
    ]
    if early:
        parts.append("\n".join([f"**Ended early by ASHA** ({len(early)}), in no mean above", "", *early]))
    return "\n\n".join(parts) + "\n"


def table(outcome: Outcome, metrics: list[str]) -> Iterator[str]:
    """An arm a line: the mean of each metric with its 95 % interval; the arm that others are compared with is marked."""
    reference = reference_of(outcome.sweep)
    yield f"| arm | {' | '.join(metrics)} |"
    yield f"|---|{'---|' * len(metrics)}"
    for arm in outcome.arms:
        cells = []
        for metric in metrics:
            by_seed = outcome.values(metric).get(arm)
            cells.append(_with_interval(metric, estimate(list(by_seed.values()))) if by_seed else "none")
        mark = " (reference)" if arm == reference else ""
        yield f"| {label_of(arm)}{mark} | {' | '.join(cells)} |"


def sentences(outcome: Outcome, metric: str) -> Iterator[str]:
    """Which arms differ from the reference, by how much; over numbers also each step up, and where the fit is highest."""
    values, reference = outcome.values(metric), reference_of(outcome.sweep)
    found = differences(values, reference)
    by_mean = sorted(values, key=lambda arm: estimate(list(values[arm].values())).mean)
    ends = [(arm, estimate(list(values[arm].values()))) for arm in (by_mean[-1], by_mean[0])]
    yield (
        "; ".join(
            f"{word} mean: {label_of(arm)} with {_share(metric, mean.mean)}"
            for word, (arm, mean) in zip(("highest", "lowest"), ends, strict=True)
        )
        + "."
    )
    if len(outcome.sweep.seeds) < 2:
        yield "One seed says nothing of how much seeds differ: no difference is called one."
    else:
        same = [label_of(difference.arm) for difference in found if not difference.distinguishable]
        for difference in found:
            if difference.distinguishable:
                yield f"{label_of(difference.arm)} against {label_of(reference)}: {_change(metric, difference)}."
        if same:
            yield f"Against {label_of(reference)} {NOTHING}: {'; '.join(same)}."
    yield from _over_numbers(values, metric, len(outcome.sweep.seeds))


def _over_numbers(values: dict[Arm, dict[int, float]], metric: str, seeds: int) -> Iterator[str]:
    lines: dict[Arm, dict[float, dict[int, float]]] = {}
    for arm, by_seed in values.items():
        if (x := number(arm[0][1])) is None:
            return
        lines.setdefault(arm[1:], {})[x] = by_seed
    for rest, line in lines.items():
        axis = next(iter(values))[0][0]
        where = f" at {label_of(rest)}" if rest else ""
        steps = steps_up(line) if seeds > 1 else []
        for lower, upper, difference in steps:
            said = _change(metric, difference) if difference.distinguishable else NOTHING
            yield f"From {axis} {lower:,g} to {upper:,g}{where}: {said}."
        if steps:
            gains = [upper for _, upper, difference in steps if difference.distinguishable and difference.by.mean > 0]
            yield (
                f"The last step up of {axis}{where} that raises it for sure ends at {max(gains):,g}."
                if gains
                else f"No step up of {axis}{where} raises it for sure."
            )
        if curve := fit(line):
            peak = f"highest at {curve.peak:,.0f}" if curve.peak else "highest at an end of what was tried"
            yield f"A parabola over log2 of {axis}{where} is {peak}; it leaves {_share(metric, curve.residual, True)} over."


def _how(outcome: Outcome) -> str:
    if len(outcome.sweep.seeds) < 2:
        return "One seed: no intervals."
    return (
        f"Mean and Student's 95 % interval over {len(outcome.sweep.seeds)} seeds. Differences are paired by seed; their p values "
        "are adjusted for all arms of a metric (Holm)."
    )


def _change(metric: str, difference: Difference[Arm] | Difference[float]) -> str:
    by = difference.by
    ends = f"95 %: {_share(metric, by.low, True, sign=True)} to {_share(metric, by.high, True, sign=True)}"
    return f"{_share(metric, by.mean, True, sign=True)} ({ends}; p = {difference.p:.2g})"


def _with_interval(metric: str, found: Estimate) -> str:
    if math.isinf(found.low):
        return _share(metric, found.mean)
    return f"{_share(metric, found.mean)} ± {_share(metric, found.mean - found.low, True)}"


def _share(metric: str, value: float | None, points: bool = False, sign: bool = False) -> str:
    """A share as percent, or as points where it is a difference of shares; other numbers as they are."""
    if value is None:
        return "none"
    plus = "+" if sign else ""
    if metric.startswith(("space/", "loss", "train/")):
        return f"{value:{plus}.3f}"
    return f"{100 * value:{plus}.1f} {'points' if points else '%'}"
