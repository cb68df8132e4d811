"""The findings of a sweep as text: a table of means with intervals, and sentences with numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator

from nev.sweep.block_design import MIN_SEEDS, Difference, compare_steps, compare_with_reference
from nev.sweep.figures import make_label, parse_number
from nev.sweep.results import Outcome, is_share
from nev.sweep.statistics import LEVEL, Curve, Estimate, estimate, fit_parabola
from nev.sweep.trials import Arm, find_reference

NOT_DISTINGUISHABLE = "not distinguishable at this budget"


def describe_findings(outcome: Outcome) -> str:
    """Markdown: the question, the trials, the table, and the sentences."""
    sweep = outcome.sweep
    arms, seeds = len(outcome.arms), len(sweep.seeds)
    counts = f"{arms * seeds} trials: {arms} arms, {seeds} seed" + "s" * (seeds > 1)
    head = [f"# {sweep.name}", sweep.question, f"{counts}, {samples_seen(outcome)} by each; base {sweep.base}."]
    parts = [part for part in head if part]
    measured = [metric for metric in sweep.metrics if outcome.values(metric)]
    if measured:
        parts.append("\n".join(make_table(outcome, measured)))
        parts.append(_how(outcome))
    for metric in measured:
        parts.append("\n".join([f"**{metric}**", "", *(f"- {line}" for line in make_sentences(outcome, metric))]))
    failed = [f"- {name}: {error}" for name, error in outcome.errors.items()]
    if failed:
        parts.append("\n".join([f"**Failed** ({len(failed)}); the same command tries them again", "", *failed]))
    early = [
        f"- {result.name}: {format_number(sweep.metrics[0], result.metrics.get(sweep.metrics[0]))} at {result.samples:,} samples"
        for result in outcome.results
        if result.ended_early
    ]
    if early:
        parts.append("\n".join([f"**Ended early by ASHA** ({len(early)}), not part of any mean above", "", *early]))
    return "\n\n".join(parts) + "\n"


def samples_seen(outcome: Outcome) -> str:
    """The number of samples that trials have seen, as text."""
    least, most = outcome.samples
    return f"{least:,} samples seen" if least == most else f"{least:,} to {most:,} samples seen (whole steps)"


def make_table(outcome: Outcome, metrics: list[str]) -> Iterator[str]:
    """One line per arm: the mean of each metric with its 95 % interval. The reference is marked.

    An arm with missing seeds has no interval, since the better seeds may be left.
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
                mean = f"{format_number(metric, estimate(values).mean)}, " if values else ""
                cells.append(f"{mean}{len(values)} of {seeds} seeds")
        mark = " (reference)" if arm == reference else ""
        yield f"| {make_label(arm)}{mark} | {' | '.join(cells)} |"


def make_sentences(outcome: Outcome, metric: str) -> Iterator[str]:
    """Which arms differ from the reference, and by how much. On a numeric axis also each step up, and where the fit turns.

    Only complete arms are compared.
    """
    reference, seeds = find_reference(outcome.sweep), len(outcome.sweep.seeds)
    values = {arm: by_seed for arm, by_seed in outcome.values(metric).items() if arm in outcome.complete_arms}
    if incomplete := [make_label(arm) for arm in outcome.arms if arm not in values]:
        yield f"Not compared, since seeds are missing: {'; '.join(incomplete)}."
    if not values:
        return
    means = {arm: estimate(list(by_seed.values())).mean for arm, by_seed in values.items()}
    if len(means) > 1 and len({*means.values()}) == 1:
        yield f"{format_number(metric, means.popitem()[1])} for every arm: this metric shows no difference at this budget."
        return
    ends = (("Highest", max(means, key=means.__getitem__)), ("lowest", min(means, key=means.__getitem__)))
    yield (
        "; ".join(f"{word} mean: {make_label(arm)} with {format_number(metric, means[arm])}" for word, arm in ends)
        + "."
    )
    if seeds < MIN_SEEDS:
        yield f"With fewer than {MIN_SEEDS} seeds no difference is tested."
    elif reference in values:
        yield from _against_reference(values, reference, outcome, metric)
    if seeds >= MIN_SEEDS:
        yield from _over_numbers(values, metric, outcome.resolution(metric))


def _against_reference(
    values: dict[Arm, dict[int, float]], reference: Arm, outcome: Outcome, metric: str
) -> Iterator[str]:
    label, margin = make_label(reference), outcome.sweep.margin
    compared = compare_with_reference(values, reference, outcome.resolution(metric))
    for difference in compared:
        if difference.distinguishable:
            yield f"{make_label(difference.arm)} against {label}: {_change(metric, difference)}."
    same = [difference for difference in compared if not difference.distinguishable]
    equal = [difference for difference in same if is_share(metric) and difference.is_within(margin)]
    if equal:
        amount = format_number(metric, margin, True)
        yield f"Equal to {label} to within {amount}: {'; '.join(make_label(one.arm) for one in equal)}."
    if unknown := [difference for difference in same if difference not in equal]:
        farthest = max(max(abs(one.size.low), abs(one.size.high)) for one in unknown)
        yield (
            f"Against {label} {NOT_DISTINGUISHABLE}: {'; '.join(make_label(one.arm) for one in unknown)}. "
            f"They may differ by up to {format_number(metric, farthest, True)}."
        )


def _over_numbers(values: dict[Arm, dict[int, float]], metric: str, resolution: float) -> Iterator[str]:
    lines: dict[Arm, dict[float, dict[int, float]]] = {}
    for arm, by_seed in values.items():
        if (x := parse_number(arm[0][1])) is None:
            return
        lines.setdefault(arm[1:], {})[x] = by_seed
    axis = next(iter(values))[0][0]
    for (rest, line), steps in zip(lines.items(), compare_steps(list(lines.values()), resolution), strict=True):
        where = f" at {make_label(rest)}" if rest else ""
        for lower, upper, difference in steps:
            change = _change(metric, difference) if difference.distinguishable else NOT_DISTINGUISHABLE
            yield f"From {axis} {lower:,g} to {upper:,g}{where}: {change}."
        if len(steps) > 1:
            distinguishable = [upper for _, upper, difference in steps if difference.distinguishable]
            yield (
                f"The last step up of {axis}{where} that is distinguishable ends at {max(distinguishable):,g}."
                if distinguishable
                else f"No step up of {axis}{where} is distinguishable."
            )
        if curve := fit_parabola(line):
            yield _shape(curve, f"{axis}{where}", metric)


def _shape(curve: Curve, axis: str, metric: str) -> str:
    residual = f"residuals of {format_number(metric, curve.residual, True)}"
    if curve.p >= 1 - LEVEL:
        return f"Over log2 of {axis} no curvature is distinguishable (p = {curve.p:.2g}; a parabola has {residual})."
    extreme = "highest" if curve.top else "lowest"
    turn = f"{extreme} at {curve.turn:,.3g}" if curve.turn else "highest and lowest at the ends of the tried range"
    return f"A parabola over log2 of {axis} is {turn} (p of the curvature = {curve.p:.2g}; {residual})."


def _how(outcome: Outcome) -> str:
    if len(outcome.sweep.seeds) < 2:
        return "One seed: no intervals."
    return (
        f"Mean and Student's 95 % interval over {len(outcome.sweep.seeds)} seeds. Differences are those of a randomised "
        "block: at the same seeds, with one error for all arms. Their intervals hold for all arms of a metric at once, and their "
        "p values are adjusted likewise (Dunnett); p values of steps up are adjusted for all steps (Holm)."
    )


def _change(metric: str, difference: Difference[Arm] | Difference[float]) -> str:
    size = difference.size
    ends = f"95 %: {format_number(metric, size.low, True, sign=True)} to {format_number(metric, size.high, True, sign=True)}"
    return f"{format_number(metric, size.mean, True, sign=True)} ({ends}; p = {difference.p:.2g})"


def _with_interval(metric: str, value: Estimate) -> str:
    if math.isinf(value.low):
        return format_number(metric, value.mean)
    return f"{format_number(metric, value.mean)} ± {format_number(metric, value.mean - value.low, True)}"


def format_number(metric: str, value: float | None, points: bool = False, sign: bool = False) -> str:
    """Format a share in percent, a difference of shares in points, and any other number with three digits."""
    if value is None:
        return "none"
    plus = "+" if sign else ""
    if not is_share(metric):
        return f"{value:{plus}.3f}"
    return f"{100 * value:{plus}.1f} {'points' if points else '%'}"
