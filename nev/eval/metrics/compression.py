"""Search with smaller vectors: fewer numbers, stored as bytes or bits.

Images and texts are cut, scaled to unit length, and rounded.
int8: each vector times 127 / its largest number (`nev.ops.vectors.round_to`); the score is the cosine of the bytes.
binary: signs; the score is the share of equal bits less the share of different bits. Bits tie often, and of tied candidates the
right ones rank last here (`nev.eval.metrics.ranks`), where an index would choose at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from nev.eval.metrics.ranks import Floats
from nev.ops.vectors import round_to, scale_to_unit, truncate

PRECISIONS = {"float32": 32, "int8": 8, "binary": 1}  # bits for a number
NARROWEST = 32


class Compressed(NamedTuple):
    """A form of vectors, and the score of the search with it. bytes: size of a vector."""

    width: int
    precision: str
    bytes: int
    score: float


def compressions(left: Floats, right: Floats, score: Callable[[Floats, Floats], float]) -> Iterator[Compressed]:
    """The `score` of two sets of unit vectors, [n, D] and [m, D], at each width (D, D/2, ... down to 32) and precision."""
    width = left.shape[1]
    while width:
        for precision, bits in PRECISIONS.items():
            sides = (quantise(cut(side, width), precision) for side in (left, right))
            yield Compressed(width, precision, -(-width * bits // 8), score(*sides))
        width = width // 2 if width // 2 >= NARROWEST else 0


def cut(rows: Floats, width: int) -> Floats:
    """The first `width` numbers of unit rows, scaled to unit length.

    A row of zeros there becomes a row of equal numbers, since scores are computed from unit vectors.
    """
    short = truncate(rows, width)
    return np.where((short == 0).all(axis=1, keepdims=True), np.float32(width**-0.5), short)


def quantise(rows: Floats, precision: str) -> Floats:
    """Unit rows rounded to `precision`, as floats of unit length: their products are the cosines of the rounded rows."""
    stored = round_to(rows, precision)
    if precision == "binary":
        stored = np.unpackbits(stored, axis=1, count=rows.shape[1]) * np.float32(2) - 1
    return rows if precision == "float32" else scale_to_unit(stored.astype(np.float32))
