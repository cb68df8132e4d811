"""The same search with smaller vectors: cut to fewer numbers, and held as bytes or bits. What an index saves, and what it costs.

Both sides are cut, made unit again, and rounded. int8: numbers times 127 / the largest of the set: one scale for a whole index;
the score is the cosine of the bytes. binary: signs; the score is the share of equal bits less that of others. Bits tie often,
and of tied candidates the right ones come last here (`nev.eval.metrics.ranks`), where an index would draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.eval.metrics.ranks import Floats

PRECISIONS = {"float32": 32, "int8": 8, "binary": 1}  # bits a number
NARROWEST = 32


class Compressed(NamedTuple):
    """A way to hold vectors, and what a score is under it. bytes: of one vector."""

    width: int
    precision: str
    bytes: int
    score: float


def compressions(left: Floats, right: Floats, score: Callable[[Floats, Floats], float]) -> Iterator[Compressed]:
    """`score` of two sets of unit vectors, [n, D] and [m, D], at every width (D, D/2, ... to 32 at least) and precision."""
    width = left.shape[1]
    while width:
        for precision, bits in PRECISIONS.items():
            held = (quantise(truncate(side, width), precision) for side in (left, right))
            yield Compressed(width, precision, -(-width * bits // 8), score(*held))
        width = width // 2 if width // 2 >= NARROWEST else 0


def truncate(rows: Floats, width: int) -> Floats:
    """The first `width` numbers of each row, made unit again (Matryoshka, arXiv 2205.13147)."""
    return _unit(rows[:, :width])


def quantise(rows: Floats, precision: str) -> Floats:
    """Unit rows as `precision` holds them, as floats that are unit again: their products are the cosines of the held ones.

    Where a row has lost its length (all zeros) it points nowhere, in equal parts in every direction.
    """
    if precision == "int8":
        return _unit(np.round(rows * (127 / np.abs(rows).max())))
    if precision == "binary":
        return _unit(np.where(rows > 0, 1.0, -1.0))
    return rows


def _unit(rows: NDArray[np.floating]) -> Floats:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    filled = np.where(length > 0, rows, 1.0)
    return np.asarray(filled / np.linalg.norm(filled, axis=1, keepdims=True), np.float32)
