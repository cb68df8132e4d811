"""Near-duplicates by vector, in clusters of neighbours (SemDeDup, arXiv 2303.09540).

Rows are considered in an order. A row is left out if it is near a row that has stayed: if their cosine is the threshold or more.
So each row that is left out has a near row that stays, and no two rows of a cluster that stay are near. (SemDeDup's published
code leaves a row out for any near row before it, whether that one stays or not: of a chain only the first row stays.)

Pairs in two clusters are not seen. Time: n k + n² / k products of D numbers, least at k = sqrt(n) or so.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.embed.clusters import Pool, count_clusters, make_clusters
from nev.ops.vectors import Floats

BLOCK = 1024  # rows that are compared at a time


class Duplicates(NamedTuple):
    """The rows that are left out, in their order.

    rows: int64 [m], row numbers in the pool.
    originals: int64 [m], the nearest row that stays.
    cosines: float32 [m], of both.
    """

    rows: NDArray[np.int64]
    originals: NDArray[np.int64]
    cosines: Floats


def find_duplicates(
    pool: Pool, threshold: float, scores: Floats | None = None, clusters: int | None = None
) -> Duplicates:
    """Find the near-duplicates among the chosen rows of a pool.

    threshold: least cosine of near-duplicates.
    scores: float32 [rows]; of each group the row with the largest score stays, of equal ones the first. None: the first.
    clusters: their number. None: `count_clusters`.
    """
    count = clusters or count_clusters(int(pool.chosen.sum()))
    groups = [Duplicates(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    with make_clusters(pool, count) as divided:
        for start, stop in zip(divided.bounds[:-1], divided.bounds[1:], strict=True):
            rows = np.array(divided.rows[start:stop])
            order = np.arange(len(rows)) if scores is None else np.argsort(-scores[rows], kind="stable")
            original, cosines = compare(pool, divided.vectors[start:stop], order, threshold)
            out = np.flatnonzero(original >= 0)
            groups.append(Duplicates(rows[out], rows[original[out]], cosines[out]))
    rows, originals, cosines = (np.concatenate(parts) for parts in zip(*groups, strict=True))
    by_row = np.argsort(rows)
    return Duplicates(rows[by_row], originals[by_row], cosines[by_row])


def compare(
    pool: Pool, stored: NDArray[Any], order: NDArray[np.int64], threshold: float
) -> tuple[NDArray[np.int64], Floats]:
    """The nearest row that stays of each row that does not, int64 [m], else -1; and the cosine of both.

    stored: vectors of a cluster, as they are stored. order: rows in the order in which they are considered.
    """
    original, cosines = np.full(len(order), -1), np.zeros(len(order), np.float32)
    staying = np.empty((len(order), pool.spec.width), np.float32)  # memory is taken where rows are written
    names, count = np.empty(len(order), np.int64), 0
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        vectors = pool.restore(stored[block])
        best, nearest = nearest_of(vectors, staying[:count], names)
        stays = best < threshold
        inner = np.tril(vectors @ vectors.T, -1)
        for i in np.flatnonzero((inner >= threshold).any(axis=1)):
            before = np.where(stays[:i], inner[i, :i], -np.inf)
            j = int(before.argmax())
            if before[j] >= threshold:
                stays[i] = False
                if before[j] > best[i]:
                    best[i], nearest[i] = before[j], block[j]
        left, stay = np.flatnonzero(~stays), np.flatnonzero(stays)
        original[block[left]], cosines[block[left]] = nearest[left], best[left]
        staying[count : count + len(stay)], names[count : count + len(stay)] = vectors[stay], block[stay]
        count += len(stay)
    return original, cosines


def nearest_of(vectors: Floats, staying: Floats, names: NDArray[np.int64]) -> tuple[Floats, NDArray[np.int64]]:
    """The largest cosine of each vector with the rows that stay so far, and the name of that row."""
    best, nearest = np.full(len(vectors), -np.inf, np.float32), np.full(len(vectors), -1)
    for start in range(0, len(staying), 8 * BLOCK):
        cosines = vectors @ staying[start : start + 8 * BLOCK].T
        largest = cosines.max(axis=1)
        closer = largest > best
        nearest[closer] = names[start + cosines.argmax(axis=1)[closer]]
        best[closer] = largest[closer]
    return best, nearest
