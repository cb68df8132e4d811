"""The figure of a sweep: a panel for each metric, a point for each seed, and means with their 95 % intervals."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nev.eval.report.plots import FAINT, INK, colours, dress, new_figure, save
from nev.sweep.block_design import Values
from nev.sweep.statistics import MIN_RANGE, estimate, fit_parabola
from nev.sweep.trials import Arm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 2
TITLE_CHARACTERS = 52  # of a title's line, per panel
DODGE = 0.05  # octaves between lines, so that error bars do not hide each other

# metric to arm to seed to value
Measured = Mapping[str, Values[Arm]]


def draw_figure(
    path: str | Path, title: str, subtitle: str, measured: Measured, complete_arms: Collection[Arm]
) -> list[Path]:
    """Write `path`.png and `path`.svg. If all values of the first axis are numbers, metrics are plotted over them, else by arm.

    measured: values by metric, arm and seed. Each metric that has a value gets a panel.
    complete_arms: the arms with all seeds. Of other arms only the seeds are shown, without a mean.
    Raises ValueError where there is no value.
    """
    with_values = {metric: values for metric, values in measured.items() if values}
    if not with_values:
        raise ValueError("draw_figure: no value to draw")
    arms = list(dict.fromkeys(arm for values in with_values.values() for arm in values))
    numeric = all(parse_number(arm[0][1]) is not None for arm in arms) and len({arm[0][1] for arm in arms}) > 1
    columns, rows = min(COLUMNS, len(with_values)), -(-len(with_values) // COLUMNS)
    height = 3.6 if numeric else max(1.6, 0.9 + 0.34 * len(arms))
    figure = new_figure(5.4 * columns + 0.6, height * rows + 0.7)
    panels = figure.subplots(rows, columns, squeeze=False, sharex="all" if numeric else False)
    for axes, (metric, values) in zip(panels.flat, with_values.items(), strict=False):
        if numeric:
            plot_over_numbers(axes, metric, values, complete_arms)
        else:
            plot_by_arm(axes, metric, values, arms, complete_arms)
    for axes in list(panels.flat)[len(with_values) :]:
        axes.set_visible(False)
    wrapped = textwrap.fill(title, TITLE_CHARACTERS * columns)
    figure.suptitle(wrapped, x=0.02, ha="left", fontsize=12, fontweight="bold", color=INK, parse_math=False)
    figure.supxlabel(subtitle, x=0.02, ha="left", fontsize=8, color=FAINT, parse_math=False)
    files = [Path(f"{path}.{kind}") for kind in ("png", "svg")]
    for file in files:
        save(figure, file)
    return files


def plot_over_numbers(axes: Axes, metric: str, values: Values[Arm], complete_arms: Collection[Arm]) -> None:
    """Plot a line for each combination of the other axes, over the numbers of the first axis, and a fitted parabola."""
    lines: dict[Arm, dict[float, Mapping[int, float]]] = {}
    with_mean: dict[Arm, list[float]] = {}
    for arm, by_seed in values.items():
        x = parse_number(arm[0][1])
        assert x is not None
        lines.setdefault(arm[1:], {})[x] = by_seed
        if arm in complete_arms:
            with_mean.setdefault(arm[1:], []).append(x)
    settings = sorted({x for line in lines.values() for x in line})
    log = settings[0] > 0 and settings[-1] >= MIN_RANGE * settings[0]
    fitted = 0
    for position, ((rest, line), colour) in enumerate(zip(lines.items(), colours(len(lines)), strict=True)):
        xs = sorted(with_mean.get(rest, []))
        dodge = 2 ** (DODGE * (position - (len(lines) - 1) / 2)) if log else 1.0
        for x in sorted(line):
            axes.scatter(
                [dodge * x] * len(line[x]), list(line[x].values()), s=14, color=colour, alpha=0.45, linewidth=0
            )
        estimates = [estimate(list(line[x].values())) for x in xs]
        bars = [_bar(value.mean, value.low) for value in estimates]
        label = ", ".join(value for _, value in rest) or None
        means = [value.mean for value in estimates]
        style: dict[str, Any] = {
            "color": colour,
            "marker": "o",
            "markersize": 5,
            "capsize": 3,
            "linewidth": 1.6,
            "label": label,
        }
        axes.errorbar([dodge * x for x in xs], means, yerr=bars, **style)
        if curve := fit_parabola({x: line[x] for x in xs}):
            dense = np.geomspace(xs[0], xs[-1], 100)
            name = None if fitted else "a parabola over log2"
            axes.plot(dense, [curve(float(x)) for x in dense], color=colour, linestyle=":", linewidth=1.2, label=name)
            fitted += 1
    if log:
        axes.set_xscale("log", base=2)
    axes.set_xticks(settings, [f"{x:,.6g}" for x in settings], rotation=30 if len(settings) > 6 else 0)
    axes.minorticks_off()
    dress(axes, next(iter(values))[0][0], metric, legend=len(lines) > 1 or fitted > 0)


def plot_by_arm(
    axes: Axes, metric: str, values: Values[Arm], arms: Sequence[Arm], complete_arms: Collection[Arm]
) -> None:
    """Plot a row for each arm, the first arm on top: seeds as points, and the mean with its interval."""
    for position, (arm, colour) in enumerate(zip(arms, colours(len(arms)), strict=True)):
        by_seed = values.get(arm)
        if not by_seed:
            continue
        axes.scatter(list(by_seed.values()), [position] * len(by_seed), s=16, color=colour, alpha=0.45, linewidth=0)
        if arm not in complete_arms:
            continue
        value = estimate(list(by_seed.values()))
        bar = _bar(value.mean, value.low)
        axes.errorbar([value.mean], [position], xerr=[bar], color=colour, marker="o", capsize=3)
    dress(axes, metric, "", legend=False)
    axes.set_yticks(range(len(arms)), [make_label(arm) for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#e6e8eb", linewidth=0.8)


def make_label(arm: Arm) -> str:
    """A short label of an arm."""
    return ", ".join(value if len(arm) == 1 else f"{axis.rpartition('.')[2]} {value}" for axis, value in arm)


def parse_number(value: str) -> float | None:
    """The number that a label spells, or None."""
    try:
        return float(value)
    except ValueError:
        return None


def _bar(mean: float, low: float) -> float:
    return 0.0 if math.isinf(low) else mean - low
