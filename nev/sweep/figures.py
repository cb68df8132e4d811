"""The figure of a sweep: each metric on a panel of its own, a point for each seed, means with their 95 % intervals."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nev.eval.report.plots import FAINT, INK, colours, dress, new_figure, save
from nev.sweep.statistics import SPAN, Values, estimate, fit
from nev.sweep.trials import Arm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 2
TITLE_CHARACTERS = 52  # a panel
DODGE = 0.05  # octaves between lines, so that bars do not hide each other

# metric to arm to seed to value
Measured = Mapping[str, Values[Arm]]


def draw_figure(
    path: str | Path, title: str, subtitle: str, measured: Measured, complete: Collection[Arm]
) -> list[Path]:
    """Write `path`.png and `path`.svg: over the first axis where all its values are numbers, else an arm a line.

    measured: a panel for each metric that has a value. complete: the arms with all seeds; of others the seeds alone are shown.
    Raises ValueError where there is no value.
    """
    shown = {metric: values for metric, values in measured.items() if values}
    if not shown:
        raise ValueError("draw: no value to draw")
    arms = list(dict.fromkeys(arm for values in shown.values() for arm in values))
    numeric = all(number(arm[0][1]) is not None for arm in arms) and len({arm[0][1] for arm in arms}) > 1
    columns, rows = min(COLUMNS, len(shown)), -(-len(shown) // COLUMNS)
    height = 3.6 if numeric else max(1.6, 0.9 + 0.34 * len(arms))
    figure = new_figure(5.4 * columns + 0.6, height * rows + 0.7)
    panels = figure.subplots(rows, columns, squeeze=False, sharex="all" if numeric else False)
    for axes, (metric, values) in zip(panels.flat, shown.items(), strict=False):
        if numeric:
            over_numbers(axes, metric, values, complete)
        else:
            by_arm(axes, metric, values, arms, complete)
    for axes in list(panels.flat)[len(shown) :]:
        axes.set_visible(False)
    wrapped = textwrap.fill(title, TITLE_CHARACTERS * columns)
    figure.suptitle(wrapped, x=0.02, ha="left", fontsize=12, fontweight="bold", color=INK, parse_math=False)
    figure.supxlabel(subtitle, x=0.02, ha="left", fontsize=8, color=FAINT, parse_math=False)
    made = [Path(f"{path}.{kind}") for kind in ("png", "svg")]
    for file in made:
        save(figure, file)
    return made


def over_numbers(axes: Axes, metric: str, values: Values[Arm], complete: Collection[Arm]) -> None:
    """A line for each combination of the other axes, over the numbers of the first, with `statistics.fit`."""
    lines: dict[Arm, dict[float, Mapping[int, float]]] = {}
    whole: dict[Arm, list[float]] = {}
    for arm, by_seed in values.items():
        x = number(arm[0][1])
        assert x is not None
        lines.setdefault(arm[1:], {})[x] = by_seed
        if arm in complete:
            whole.setdefault(arm[1:], []).append(x)
    settings = sorted({x for line in lines.values() for x in line})
    log = settings[0] > 0 and settings[-1] >= SPAN * settings[0]
    fitted = 0
    for place, ((rest, line), colour) in enumerate(zip(lines.items(), colours(len(lines)), strict=True)):
        xs = sorted(whole.get(rest, []))
        aside = 2 ** (DODGE * (place - (len(lines) - 1) / 2)) if log else 1.0
        for x in sorted(line):
            axes.scatter(
                [aside * x] * len(line[x]), list(line[x].values()), s=14, color=colour, alpha=0.45, linewidth=0
            )
        found = [estimate(list(line[x].values())) for x in xs]
        bars = [_bar(one.mean, one.low) for one in found]
        label = ", ".join(value for _, value in rest) or None
        means = [one.mean for one in found]
        style: dict[str, Any] = {
            "color": colour,
            "marker": "o",
            "markersize": 5,
            "capsize": 3,
            "linewidth": 1.6,
            "label": label,
        }
        axes.errorbar([aside * x for x in xs], means, yerr=bars, **style)
        if curve := fit({x: line[x] for x in xs}):
            dense = np.geomspace(xs[0], xs[-1], 100)
            name = None if fitted else "a parabola over log2"
            axes.plot(dense, [curve(float(x)) for x in dense], color=colour, linestyle=":", linewidth=1.2, label=name)
            fitted += 1
    if log:
        axes.set_xscale("log", base=2)
    axes.set_xticks(settings, [f"{x:,.6g}" for x in settings], rotation=30 if len(settings) > 6 else 0)
    axes.minorticks_off()
    dress(axes, next(iter(values))[0][0], metric, legend=len(lines) > 1 or fitted > 0)


def by_arm(axes: Axes, metric: str, values: Values[Arm], arms: Sequence[Arm], complete: Collection[Arm]) -> None:
    """A line for each arm, the first one on top: seeds as points, the mean with its interval."""
    for place, (arm, colour) in enumerate(zip(arms, colours(len(arms)), strict=True)):
        by_seed = values.get(arm)
        if not by_seed:
            continue
        axes.scatter(list(by_seed.values()), [place] * len(by_seed), s=16, color=colour, alpha=0.45, linewidth=0)
        if arm not in complete:
            continue
        found = estimate(list(by_seed.values()))
        axes.errorbar([found.mean], [place], xerr=[_bar(found.mean, found.low)], color=colour, marker="o", capsize=3)
    dress(axes, metric, "", legend=False)
    axes.set_yticks(range(len(arms)), [make_label(arm) for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#e6e8eb", linewidth=0.8)


def make_label(arm: Arm) -> str:
    """An arm in few words."""
    return ", ".join(value if len(arm) == 1 else f"{axis.rpartition('.')[2]} {value}" for axis, value in arm)


def number(value: str) -> float | None:
    """The number that a label is, None where it is none."""
    try:
        return float(value)
    except ValueError:
        return None


def _bar(mean: float, low: float) -> float:
    return 0.0 if math.isinf(low) else mean - low
