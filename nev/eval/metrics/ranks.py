"""Where the right answers rank among all candidates, in tiles: what zero-shot accuracy and recall@k both count.

Ties count against the model: a wrong candidate that scores as much as the right one is ranked before it. So embeddings
that have collapsed to one point score 0 and not 100 %, which is what a strict comparison would make of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# Scores that lie closer are compared anew in float64: a cosine differs by some 1e-7 from one route in float32 to another (a row
# product, a tile of a matrix product), and equal embeddings must tie whichever route their scores took.
NEAR = 1e-6
CROWD = (
    32  # candidates of one query that lie so near: where there are more, the space has collapsed, and all count as tied
)


def unit_rows(name: str, array: ArrayLike) -> Floats:
    """`array` as contiguous float32 [rows, D]; fp16 storage is welcome.

    Raises ValueError, naming the first bad row, unless each is finite and of unit length to 1 %.
    """
    rows = np.ascontiguousarray(array, dtype=np.float32)
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"{name}: embeddings of shape [rows, D] are needed, not {list(rows.shape)}")
    length = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    if not np.isfinite(length).all():
        bad = np.flatnonzero(~np.isfinite(length))
        raise ValueError(f"{name}: {len(bad)} of {len(rows)} rows hold NaN or infinity, the first is row {bad[0]}")
    if (np.abs(length - 1) > 1e-2).any():
        bad = np.flatnonzero(np.abs(length - 1) > 1e-2)
        raise ValueError(
            f"{name}: {len(bad)} of {len(rows)} rows are not of unit length, the first is row {bad[0]} "
            f"with length {length[bad[0]]:.4g}: normalise them"
        )
    return rows


def row_numbers(name: str, array: ArrayLike, count: int, limit: int, of: str) -> Ints:
    """`array` as int64 [count]. Raises ValueError unless every number is in [0, limit)."""
    numbers = np.asarray(array)
    if numbers.shape != (count,) or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(f"{name}: {count} integers are needed, not {numbers.dtype} of shape {list(numbers.shape)}")
    outside = np.flatnonzero((numbers < 0) | (numbers >= limit))
    if len(outside):
        raise ValueError(
            f"{name}: {len(outside)} of {count} are outside 0..{limit - 1} ({of}); the first is "
            f"{numbers[outside[0]]} at row {outside[0]}: drop rows without a known one before scoring"
        )
    return numbers.astype(np.int64)


def best_ranks(queries: Floats, candidates: Floats, query: Ints, right: Ints, chunk: int) -> Ints:
    """For each query, how many wrong candidates score at least as much as its best right one: int64 [n].

    queries [n, D], candidates [m, D], and pairs (query[p], right[p]): candidate right[p] answers query query[p]; every
    query has at least one. A query is answered within the first k exactly if its rank is below k. Scores are computed
    in tiles of at most chunk x chunk, so memory is O(chunk^2 + chunk D + n + m) beside the embeddings.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    best = np.full(len(queries), -np.inf, np.float32)
    for at in range(0, len(query), chunk):
        pairs = slice(at, at + chunk)
        np.maximum.at(best, query[pairs], np.einsum("pd,pd->p", queries[query[pairs]], candidates[right[pairs]]))

    order = np.argsort(query, kind="stable")
    query, right = query[order], right[order]
    ranks, crowd = np.zeros(len(queries), np.int64), np.zeros(len(queries), np.int64)
    near: list[tuple[Ints, Ints]] = []
    for top in range(0, len(queries), chunk):
        rows = slice(top, top + chunk)
        # The right answers of these queries: each is taken out of the count in the tile where it lies.
        pairs = slice(*np.searchsorted(query, (top, top + chunk)))
        low, high = best[rows, None] - np.float32(NEAR), best[rows, None] + np.float32(NEAR)
        for left in range(0, len(candidates), chunk):
            tile = scores(queries[rows], candidates[left : left + chunk])
            inside = (right[pairs] >= left) & (right[pairs] < left + chunk)
            tile[query[pairs][inside] - top, right[pairs][inside] - left] = -np.inf
            above = tile >= low
            ranks[rows] += np.count_nonzero(above, axis=1)
            above &= tile <= high
            crowd[rows] += np.count_nonzero(above, axis=1)
            above[crowd[rows] > CROWD] = False  # nor is it remembered, or a collapsed space would fill the memory
            one, other = np.nonzero(above)
            near.append((one + top, other + left))
    one, other = (np.concatenate(side) for side in zip(*near, strict=True))
    few = crowd[one] <= CROWD
    return ranks - _behind(queries, candidates, query, right, one[few], other[few], chunk)


def _behind(queries: Floats, candidates: Floats, query: Ints, right: Ints, one: Ints, other: Ints, chunk: int) -> Ints:
    """How many of the pairs (one[p], other[p]) score less than the best right answer of their query, in float64: int64 [n]."""
    asked = np.isin(query, one)
    best = np.full(len(queries), -np.inf)
    np.maximum.at(best, query[asked], _exact(queries, candidates, query[asked], right[asked], chunk))
    less = _exact(queries, candidates, one, other, chunk) < best[one]
    return np.bincount(one[less], minlength=len(queries))


def _exact(queries: Floats, candidates: Floats, one: Ints, other: Ints, chunk: int) -> NDArray[np.float64]:
    """Scores of pairs, by the same route for all: equal embeddings give equal ones."""
    found = [
        np.einsum("pd,pd->p", queries[one[at : at + chunk]], candidates[other[at : at + chunk]], dtype=np.float64)
        for at in range(0, len(one), chunk)
    ]
    return np.concatenate(found) if found else np.empty(0)


def scores(queries: Floats, candidates: Floats) -> Floats:
    """Cosines of one tile, float32 [rows, columns]: the only place that holds scores."""
    return queries @ candidates.T


def mean_cosine(rows: Floats) -> float:
    """Mean cosine of ordered pairs of different unit rows: (|sum|^2 - n) / (n (n - 1))."""
    n = len(rows)
    return float(((rows.sum(0, dtype=np.float64) ** 2).sum() - n) / (n * (n - 1)))
