"""Curves and galleries as PNG.

Functions import matplotlib when they are called, and use its object interface alone: without pyplot there is no display and no
global state, and `savefig` renders with Agg. A dollar sign in a caption does not start a formula.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Mapping[str, tuple[ArrayLike, ArrayLike]]

COLOURS = ("#2f6db3", "#d9822b", "#3b9c6e", "#b3476b", "#7a5fb0", "#6b7280")
INK, FAINT, GREEN = "#20242a", "#8a919c", "#2ca25f"
DPI = 150


def curve(
    path: str | Path,
    series: Curves,
    title: str,
    ylabel: str,
    points: Curves | None = None,
    points_ylabel: str = "validation",
) -> None:
    """Training curves by step, 1200 x 675 px; 1200 x 1050 px with `points`, which have a panel below.

    series: name to (steps [n], values [n]); drawn raw and faint under a running mean over a twentieth of the steps.
    points: name to (steps [n], values [n]); drawn as marked points, never smoothed. Non-finite values are left out.
    Raises ValueError for no series, unequal lengths, and a series without one finite value.
    """
    if not series:
        raise ValueError("curve: no series to draw")
    figure = new_figure(8, 7 if points else 4.5)
    panels = figure.subplots(2 if points else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 2] if points else [1])
    upper, lower = panels[0, 0], panels[-1, 0]
    for (name, xy), colour in zip(series.items(), colours(len(series)), strict=True):
        steps, values = _finite(name, *xy)
        smooth, window = _running_mean(values)
        if window > 1:
            upper.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        upper.plot(steps, smooth, color=colour, linewidth=2, label=name, marker="o" if len(steps) == 1 else None)
    dress(upper, "", ylabel, legend=len(series) > 1)
    for (name, xy), colour in zip((points or {}).items(), colours(len(points or {}), start=1), strict=True):
        steps, values = _finite(name, *xy)
        lower.plot(steps, values, color=colour, linewidth=1.5, marker="o", markersize=5, label=name)
    if points:
        dress(lower, "", points_ylabel, legend=True)
    lower.set_xlabel("step")
    upper.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=12, parse_math=False)
    save(figure, path)


def gallery(
    path: str | Path,
    queries: Sequence[str],
    results: Sequence[Sequence[NDArray[np.uint8]]],
    scores: Sequence[Sequence[float]],
    correct: Sequence[Sequence[bool]],
) -> None:
    """Retrieval results: a row for each query, the caption at the left, the pictures beside it in their order.

    queries: Q captions.
    results: Q rows of K pictures, uint8 [H, W, 3], of any sizes. Rows may have different K.
    scores: Q x K cosines, written below the pictures.
    correct: Q x K; correct pictures have a green frame.
    The PNG is (363 + 225 K) x (18 + 264 Q) px; up to Q = 12 and K = 10 it is easy to read.
    Raises ValueError for no query, unequal lengths, and a picture that is not uint8 [H, W, 3].
    """
    if not queries or not len(queries) == len(results) == len(scores) == len(correct):
        raise ValueError(
            f"gallery: equal numbers of queries, results, scores and correct are needed, and at least one, "
            f"not {len(queries)}, {len(results)}, {len(scores)} and {len(correct)}"
        )
    for row, (pictures, row_scores, row_correct) in enumerate(zip(results, scores, correct, strict=True)):
        if not pictures or not len(pictures) == len(row_scores) == len(row_correct):
            raise ValueError(
                f"gallery: query {row} has {len(pictures)} pictures, {len(row_scores)} scores and "
                f"{len(row_correct)} marks: equal numbers are needed, and at least one"
            )
        for picture in pictures:
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise ValueError(f"gallery: a picture is uint8 [H, W, 3], not {picture.dtype} {list(picture.shape)}")

    text, cell, inset, beneath, margin = 2.3, 1.5, 0.06, 0.26, 0.12  # inches
    width = text + cell * max(map(len, results)) + margin
    height = margin + (cell + beneath) * len(queries)
    figure = new_figure(width, height, constrained=False)
    # One Axes spans the figure, in inches. An Axes for each picture would take most of a page's drawing time.
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    for row, (query, pictures) in enumerate(zip(queries, results, strict=True)):
        upper = height - margin - row * (cell + beneath)
        middle = (upper - cell / 2) / height
        lines = textwrap.wrap(query, 26, max_lines=6, placeholder=" …") or ["(empty caption)"]
        style: dict[str, Any] = {"fontsize": 10, "color": INK, "linespacing": 1.35, "parse_math": False}
        figure.text(0.18 / width, middle, "\n".join(lines), va="center", ha="left", **style)
        for column, picture in enumerate(pictures):
            left = text + column * cell
            _picture(axes, picture, left + inset, upper - cell + inset, cell - 2 * inset, bool(correct[row][column]))
            score = f"{scores[row][column]:.3f}"
            weight, colour = ("bold", GREEN) if correct[row][column] else ("normal", FAINT)
            centre, base = (left + cell / 2) / width, (upper - cell - 0.08) / height
            figure.text(centre, base, score, ha="center", va="center", fontsize=8, color=colour, weight=weight)
    save(figure, path)


def _picture(axes: Axes, picture: NDArray[np.uint8], x: float, y: float, size: float, correct: bool) -> None:
    """Draw the whole picture, its proportions unchanged, in the middle of a square. A correct picture has a green frame.

    x, y: the square's lower left corner. size: its side.
    """
    from matplotlib.patches import Rectangle

    side = max(picture.shape[:2])
    down, right = (side - picture.shape[0]) // 2, (side - picture.shape[1]) // 2
    square = np.full((side, side, 3), 255, np.uint8)
    square[down : down + picture.shape[0], right : right + picture.shape[1]] = picture
    # Small pictures (32 px of CIFAR) stay crisp when enlarged; large ones are shrunk smoothly.
    interpolation = "nearest" if side < 100 else "antialiased"
    axes.imshow(square, interpolation=interpolation, extent=(x, x + size, y, y + size), aspect="auto")
    if correct:
        axes.add_patch(Rectangle((x, y), size, size, fill=False, edgecolor=GREEN, linewidth=4))


def _finite(name: str, steps: ArrayLike, values: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"curve: series {name!r} has {list(x.shape)} steps and {list(y.shape)} values")
    finite = np.isfinite(x) & np.isfinite(y)
    if not finite.any():
        raise ValueError(f"curve: series {name!r} has no finite value")
    return x[finite], y[finite]


def _running_mean(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """(mean, window). window: a twentieth of the values, an odd number; near an end the mean is over fewer values."""
    half = len(values) // 40
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[last] - total[first]) / (last - first), 2 * half + 1


def colours(count: int, start: int = 0) -> list[str]:
    """So many colours, different ones as far as COLOURS goes."""
    return [COLOURS[(start + i) % len(COLOURS)] for i in range(count)]


def new_figure(width: float, height: float, constrained: bool = True) -> Figure:
    """A white figure. width, height: in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15) if constrained else None
    return Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)


def dress(axes: Axes, xlabel: str, ylabel: str, legend: bool) -> None:
    """Draw labels, thin axes, and a grid to read values from."""
    axes.set_xlabel(xlabel, color=INK, parse_math=False)
    axes.set_ylabel(ylabel, color=INK, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    if legend:
        axes.legend(frameon=False, fontsize=9)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure, in the format of the path's suffix, and make the folders above."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
