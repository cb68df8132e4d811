"""What a sweep has found, as text: a table of means with intervals, and sentences with numbers in them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from nev.sweep.figures import make_label, number
from nev.sweep.results import Outcome, is_share
from nev.sweep.statistics import FEWEST, LEVEL, Curve, Difference, Estimate, differences, estimate, fit, steps_up
from nev.sweep.trials import Arm, find_reference

NOTHING = "not distinguishable at this budget"


def findings(outcome: Outcome) -> str:
    """Markdown: the question, what was tried, the table, and the sentences."""
    sweep = outcome.sweep
    arms, seeds = len(outcome.arms), len(sweep.seeds)
    counts = f"{arms * seeds} trials: {arms} arms, {seeds} seed" + "s" * (seeds > 1)
    head = [f"# {sweep.name}", sweep.question, f"{counts}, {seen(outcome)} by each; base {sweep.base}."]
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
        f"- {result.name}: {_number(sweep.metrics[0], result.metrics.get(sweep.metrics[0]))} at {result.samples:,} samples"
        for result in outcome.results
        if result.ended_early
    ]
    if early:
        parts.append("\n".join([f"**Ended early by ASHA** ({len(early)}), in no mean above", "", *early]))
    return "\n\n".join(parts) + "\n"


def seen(outcome: Outcome) -> str:
    """The samples that trials have seen."""
    least, most = outcome.samples
    return f"{least:,} samples seen" if least == most else f"{least:,} to {most:,} samples seen (whole steps)"


def table(outcome: Outcome, metrics: list[str]) -> Iterator[str]:
    """An arm a line: the mean of each metric with its 95 % interval; the arm that others are compared with is marked.

    An arm that lacks seeds has no interval: what is left of it may be the better ones.
    """
    reference, seeds = find_reference(outcome.sweep), len(outcome.sweep.seeds)
    yield f"| arm | {' | '.join(metrics)} |"
    yield f"|---|{'---|' * len(metrics)}"
    for arm in outcome.arms:
        cells = []
        for metric in metrics:
            values = list(outcome.values(metric).get(arm, {}).values())
            if len(values) == seeds:
                cells.append(_with_interval(metric, estimate(values)))
            else:
                mean = f"{_number(metric, estimate(values).mean)}, " if values else ""
                cells.append(f"{mean}{len(values)} of {seeds} seeds")
        mark = " (reference)" if arm == reference else ""
        yield f"| {make_label(arm)}{mark} | {' | '.join(cells)} |"


def sentences(outcome: Outcome, metric: str) -> Iterator[str]:
    """Which arms differ from the reference, by how much; over numbers also each step up, and where the fit turns.

    Of arms whose seeds all have seen all samples.
    """
    reference, seeds = find_reference(outcome.sweep), len(outcome.sweep.seeds)
    values = {arm: own for arm, own in outcome.values(metric).items() if arm in outcome.complete}
    if left := [make_label(arm) for arm in outcome.arms if arm not in values]:
        yield f"Not compared, since seeds are missing: {'; '.join(left)}."
    if not values:
        return
    means = {arm: estimate(list(own.values())).mean for arm, own in values.items()}
    if len(means) > 1 and len({*means.values()}) == 1:
        yield f"{_number(metric, means.popitem()[1])} for every arm: it tells none from another at this budget."
        return
    ends = (("Highest", max(means, key=means.__getitem__)), ("lowest", min(means, key=means.__getitem__)))
    yield "; ".join(f"{word} mean: {make_label(arm)} with {_number(metric, means[arm])}" for word, arm in ends) + "."
    if seeds < FEWEST:
        yield f"Fewer than {FEWEST} seeds say too little of how much seeds differ: no difference is called one."
    elif reference in values:
        found = differences(values, reference, outcome.resolution(metric))
        same = [make_label(difference.arm) for difference in found if not difference.distinguishable]
        for difference in found:
            if difference.distinguishable:
                yield f"{make_label(difference.arm)} against {make_label(reference)}: {_change(metric, difference)}."
        if same:
            yield f"Against {make_label(reference)} {NOTHING}: {'; '.join(same)}."
    if seeds >= FEWEST:
        yield from _over_numbers(values, metric, outcome.resolution(metric))


def _over_numbers(values: dict[Arm, dict[int, float]], metric: str, resolution: float) -> Iterator[str]:
    lines: dict[Arm, dict[float, dict[int, float]]] = {}
    for arm, by_seed in values.items():
        if (x := number(arm[0][1])) is None:
            return
        lines.setdefault(arm[1:], {})[x] = by_seed
    axis = next(iter(values))[0][0]
    for (rest, line), steps in zip(lines.items(), steps_up(list(lines.values()), resolution), strict=True):
        where = f" at {make_label(rest)}" if rest else ""
        for lower, upper, difference in steps:
            said = _change(metric, difference) if difference.distinguishable else NOTHING
            yield f"From {axis} {lower:,g} to {upper:,g}{where}: {said}."
        if len(steps) > 1:
            sure = [upper for _, upper, difference in steps if difference.distinguishable]
            yield (
                f"The last step up of {axis}{where} that is distinguishable ends at {max(sure):,g}."
                if sure
                else f"No step up of {axis}{where} is distinguishable."
            )
        if curve := fit(line):
            yield _shape(curve, f"{axis}{where}", metric)


def _shape(curve: Curve, axis: str, metric: str) -> str:
    left = f"{_number(metric, curve.residual, True)} are left over"
    if curve.p >= 1 - LEVEL:
        return f"Over log2 of {axis} no bend is distinguishable (p = {curve.p:.2g}; {left} by a parabola)."
    which = "highest" if curve.top else "lowest"
    at = f"{which} at {curve.turn:,.3g}" if curve.turn else "highest and lowest at the ends of what was tried"
    return f"A parabola over log2 of {axis} is {at} (p of the bend = {curve.p:.2g}; {left})."


def _how(outcome: Outcome) -> str:
    if len(outcome.sweep.seeds) < 2:
        return "One seed: no intervals."
    return (
        f"Mean and Student's 95 % interval over {len(outcome.sweep.seeds)} seeds. Differences are paired by seed; their p values "
        "are adjusted for all arms of a metric, those of steps up for all steps (Holm), their intervals are not."
    )


def _change(metric: str, difference: Difference[Arm] | Difference[float]) -> str:
    by = difference.by
    ends = f"95 %: {_number(metric, by.low, True, sign=True)} to {_number(metric, by.high, True, sign=True)}"
    return f"{_number(metric, by.mean, True, sign=True)} ({ends}; p = {difference.p:.2g})"


def _with_interval(metric: str, found: Estimate) -> str:
    if math.isinf(found.low):
        return _number(metric, found.mean)
    return f"{_number(metric, found.mean)} ± {_number(metric, found.mean - found.low, True)}"


def _number(metric: str, value: float | None, points: bool = False, sign: bool = False) -> str:
    """A share as percent, or as points where it is a difference of shares; numbers that are none as they are."""
    if value is None:
        return "none"
    plus = "+" if sign else ""
    if not is_share(metric):
        return f"{value:{plus}.3f}"
    return f"{100 * value:{plus}.1f} {'points' if points else '%'}"
