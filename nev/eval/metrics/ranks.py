"""The ranks of the right answers among all candidates, in tiles: both zero-shot accuracy and recall@k count these.

Ties count against the model: a wrong candidate ranks before a right candidate of the same score. So embeddings that have
collapsed to one point score 0, where a strict comparison would give them 100 %.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# Scores closer than this are computed again in float64. In float32 a cosine differs by some 1e-7 between a row product and a tile
# of a matrix product, and equal embeddings must tie however their scores were computed.
NEAR = 1e-6
# Candidates of a query closer than NEAR to the right one. With more of them the space has collapsed, and all count as tied.
CROWD = 32


def unit_rows(name: str, array: ArrayLike) -> Floats:
    """`array`, of any float dtype, as contiguous float32 [rows, D].

    Raises ValueError, with the first bad row, unless every row is finite and of unit length to 1 %.
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
            f"{numbers[outside[0]]} at row {outside[0]}: leave out rows without a known number before scoring"
        )
    return numbers.astype(np.int64)


def best_ranks(queries: Floats, candidates: Floats, query: Ints, right: Ints, chunk: int) -> Ints:
    """For each query, how many wrong candidates score at least as much as the best right candidate: int64 [n].

    queries: [n, D]. candidates: [m, D].
    query, right: int64 [p], pairs: candidate right[i] answers query query[i]. Every query has at least one pair.
    A query is answered within the first k exactly if its rank is below k. Scores are computed in tiles of at most
    chunk x chunk, so memory is O(chunk^2 + chunk D + n + m) beside the embeddings.
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
        # The right answers of these queries are left out of the count, each in its tile.
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
            above[crowd[rows] > CROWD] = False  # a collapsed space would fill the memory with near pairs
            row, column = np.nonzero(above)
            near.append((row + top, column + left))
    row, column = (np.concatenate(side) for side in zip(*near, strict=True))
    few = crowd[row] <= CROWD
    return ranks - _count_behind(queries, candidates, query, right, row[few], column[few], chunk)


def _count_behind(
    queries: Floats, candidates: Floats, query: Ints, right: Ints, row: Ints, column: Ints, chunk: int
) -> Ints:
    """For each query, how many pairs (row[i], column[i]) score less than its best right answer, in float64: int64 [n]."""
    needed = np.isin(query, row)
    best = np.full(len(queries), -np.inf)
    np.maximum.at(best, query[needed], _pair_scores(queries, candidates, query[needed], right[needed], chunk))
    less = _pair_scores(queries, candidates, row, column, chunk) < best[row]
    return np.bincount(row[less], minlength=len(queries))


def _pair_scores(queries: Floats, candidates: Floats, row: Ints, column: Ints, chunk: int) -> NDArray[np.float64]:
    """Scores of pairs, all computed alike, so that equal embeddings have equal scores: float64 [p]."""
    parts = [
        np.einsum("pd,pd->p", queries[row[at : at + chunk]], candidates[column[at : at + chunk]], dtype=np.float64)
        for at in range(0, len(row), chunk)
    ]
    return np.concatenate(parts) if parts else np.empty(0)


def scores(queries: Floats, candidates: Floats) -> Floats:
    """Cosines of a tile: float32 [rows, columns]. Tests replace this function to measure memory."""
    return queries @ candidates.T


def mean_cosine(rows: Floats) -> float:
    """Mean cosine of ordered pairs of different unit rows: (|sum|^2 - n) / (n (n - 1))."""
    n = len(rows)
    return float(((rows.sum(0, dtype=np.float64) ** 2).sum() - n) / (n * (n - 1)))
