"""Where the right answers rank among all candidates, in tiles: what zero-shot accuracy and recall@k both count.

Ties count against the model: a wrong candidate that scores as much as the right one is ranked before it. So embeddings
that have collapsed to one point score 0 and not 100 %, which is what a strict comparison would make of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# Scores closer than this are tied. One cosine computed by two routes (a row product, a tile of a matrix product)
# differs by about 1e-7 in float32, and equal embeddings must tie whichever route their scores took.
TIE = 1e-6


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
    ranks = np.zeros(len(queries), np.int64)
    for top in range(0, len(queries), chunk):
        rows = slice(top, top + chunk)
        # The right answers of these queries: each is taken out of the count in the tile where it lies.
        pairs = slice(*np.searchsorted(query, (top, top + chunk)))
        for left in range(0, len(candidates), chunk):
            tile = scores(queries[rows], candidates[left : left + chunk])
            inside = (right[pairs] >= left) & (right[pairs] < left + chunk)
            tile[query[pairs][inside] - top, right[pairs][inside] - left] = -np.inf
            ranks[rows] += np.count_nonzero(tile >= best[rows, None] - np.float32(TIE), axis=1)
    return ranks


def scores(queries: Floats, candidates: Floats) -> Floats:
    """Cosines of one tile, float32 [rows, columns]: the only place that holds scores."""
    return queries @ candidates.T
