"""The result of an alignment probe: the record, a table, and a figure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from nev.config.base import Section
from nev.eval.report.plots import COLOURS, FAINT, INK, dress, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL_CHARACTERS, LABEL_LINES = 34, 3  # of a trunk in the figure
WAYS = {"text_to_image": "text→image", "image_to_text": "image→text"}
MUTUAL_KNN = "mutual_knn"


class TrunkResult(Section):
    """The scores of a trunk.

    trunk: the trunk as the user has written it.
    width: F, numbers of a picture's features. pool: tokens to these features.
    image_size: in pixels. mean, std: of the pixels.
    fitted, scored: pictures that the head was fitted on, and scored on.
    bad: pictures that could not be used, by reason.
    learning_rate, steps: of the head, chosen on a tenth of the fitting pictures.
    metrics: `text_to_image_r10`, `..._low`, `..._high`, `..._chance` and so on, `mutual_knn`, `mutual_knn_chance`; in [0, 1].
    pictures_per_second: embedded, without the start of the processes. seconds: of all work for this trunk.
    reason: why the trunk could not be scored; None where it was.
    """

    trunk: str
    width: int = 0
    pool: str = ""
    image_size: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    fitted: int = 0
    scored: int = 0
    bad: dict[str, int] = Field(default={})
    learning_rate: float = 0.0
    steps: int = 0
    metrics: dict[str, float] = Field(default={})
    pictures_per_second: float = 0.0
    seconds: float = 0.0
    reason: str | None = None


class ProbeResult(Section):
    """An alignment probe of several trunks.

    experiment: name of the config. text: the text encoder.
    fitted_on, scored_on: folders of the pictures. seed: of the sample and the head. k: neighbours of `mutual_knn`.
    trunks: in the order of the command.
    """

    experiment: str
    text: str
    fitted_on: str
    scored_on: str
    seed: int
    k: int
    trunks: tuple[TrunkResult, ...]

    def ranked(self) -> list[TrunkResult]:
        """The trunks that were scored, the best first: by the mean of recall@10 both ways."""
        scored = [trunk for trunk in self.trunks if trunk.reason is None]
        return sorted(scored, key=lambda trunk: -sum(trunk.metrics[f"{way}_r10"] for way in WAYS))


def probe_table(result: ProbeResult) -> Table:
    """The trunks, the best first, a line each, and the scores of guessing."""
    title = f"alignment with {escape(result.text)}: recall@10 with its 95 % interval, mutual kNN (k = {result.k})"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)  # no frames: a log is 80 characters wide
    table.add_column("trunk", overflow="fold")
    for column in ("width", *WAYS.values(), "kNN", "pictures/s", "s"):
        table.add_column(column, justify="right", no_wrap=True)
    ranked = result.ranked()
    for trunk in ranked:
        table.add_row(
            escape(trunk.trunk),
            f"{trunk.width:,}",
            *(_format_share(trunk, f"{way}_r10") for way in WAYS),
            f"{trunk.metrics[MUTUAL_KNN]:.3f}",
            f"{trunk.pictures_per_second:,.0f}",
            f"{trunk.seconds:,.0f}",
        )
    if ranked:
        chance = ranked[0].metrics
        shares = [f"{chance[f'{way}_r10_chance']:.1%}" for way in WAYS]
        table.add_row("[dim]guessing[/]", "", *shares, f"{chance[f'{MUTUAL_KNN}_chance']:.3f}", "", "")
    return table


def _format_share(trunk: TrunkResult, name: str) -> str:
    low, high = trunk.metrics[f"{name}_low"], trunk.metrics[f"{name}_high"]
    return f"{trunk.metrics[name]:.1%}\n{100 * low:.1f} to {100 * high:.1f}"


def draw_probe(path: str | Path, result: ProbeResult) -> None:
    """Draw the trunks, the best on top: bars of recall@10 both ways with 95 % intervals, and points of the mutual kNN.

    Dotted lines are the scores of guessing. Raises ValueError where no trunk was scored.
    """
    trunks = result.ranked()
    if not trunks:
        raise ValueError("draw_probe: no trunk was scored")
    figure = new_figure(9.5, 1.5 + 0.75 * len(trunks))
    bars, points = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    _draw_recalls(bars, trunks)
    values = [trunk.metrics[MUTUAL_KNN] for trunk in trunks]
    points.scatter(values, range(len(trunks)), s=36, color=COLOURS[2], zorder=3)
    points.axvline(trunks[0].metrics[f"{MUTUAL_KNN}_chance"], color=FAINT, linestyle=":", linewidth=1.2)
    points.set_xlim(0, 1.25 * max(values))
    dress(points, f"mutual kNN (k = {result.k})", "", legend=False)
    for axes in (bars, points):
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color="#e6e8eb", linewidth=0.8)
    title = f"{result.experiment}: alignment of locked trunks with {result.text}"
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold", color=INK, parse_math=False)
    save(figure, path)


def _draw_recalls(axes: Axes, trunks: Sequence[TrunkResult]) -> None:
    """Two bars for each trunk."""
    height = 0.36
    for place, ((way, name), colour) in enumerate(zip(WAYS.items(), COLOURS, strict=False)):
        key = f"{way}_r10"
        values = [trunk.metrics[key] for trunk in trunks]
        below = [trunk.metrics[key] - trunk.metrics[f"{key}_low"] for trunk in trunks]
        above = [trunk.metrics[f"{key}_high"] - trunk.metrics[key] for trunk in trunks]
        rows = [row + (place - 0.5) * height for row in range(len(trunks))]
        style: dict[str, Any] = {"color": colour, "ecolor": INK, "capsize": 3, "label": name}
        axes.barh(rows, values, height, xerr=[below, above], **style)
        axes.axvline(trunks[0].metrics[f"{key}_chance"], color=colour, linestyle=":", linewidth=1.2)
    dress(axes, "recall@10", "", legend=True)
    axes.set_yticks(range(len(trunks)), [_wrap(trunk.trunk) for trunk in trunks])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.set_ylim(len(trunks) - 0.4, -0.6)


def _wrap(label: str) -> str:
    """A label in short lines; the middle of a long path is left out."""
    if len(label) > LABEL_CHARACTERS * LABEL_LINES:
        half = LABEL_CHARACTERS * LABEL_LINES // 2 - 1
        label = f"{label[:half]}…{label[-half:]}"
    return textwrap.fill(label, LABEL_CHARACTERS)
