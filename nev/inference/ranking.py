"""One ranked list of pictures and sentences."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nev.ops.vectors import Floats, are_usable, scale_to_unit


class Ranked(NamedTuple):
    """An item of a ranked list.

    kind: "image" or "text". position: its place among the images, or among the texts. score: cosine, after calibration.
    """

    kind: str
    position: int
    score: float


def rank_vectors(query: Floats, pictures: Floats, sentences: Floats, top: int) -> list[Ranked]:
    """The `top` rows of pictures [n, D] and sentences [m, D] by their cosine with a query, [1, D], best first.

    Rows of zeros, and rows with NaN, are left out. Of equal scores the earlier one is first, pictures before sentences.
    """
    rows, count = np.concatenate([pictures, sentences]), len(pictures)
    cosines = scale_to_unit(rows) @ scale_to_unit(query)[0]
    order = np.argsort(-cosines, kind="stable")
    return [
        Ranked("image", int(n), float(cosines[n])) if n < count else Ranked("text", int(n) - count, float(cosines[n]))
        for n in order[are_usable(rows)[order]][:top]
    ]
