"""The nearest candidates of every query, in tiles; and whether two spaces have the same neighbours."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from nev.eval.metrics.ranks import Floats, Ints


class Nearest(NamedTuple):
    """rows: int64 [n, k], candidates, the best first; the order of tied candidates is not defined. scores: float32 [n, k]."""

    rows: Ints
    scores: NDArray[np.float32]


def nearest(queries: Floats, candidates: Floats, k: int, chunk: int = 4096) -> Nearest:
    """The k candidates [m, D] of each query [n, D] with the greatest dot product; all of them where m < k.

    Scores are held in tiles of at most chunk x chunk, so memory is O(chunk^2 + n k) beside the embeddings. Raises ValueError for
    k or chunk below 1.
    """
    if k < 1 or chunk < 1:
        raise ValueError(f"k and chunk must be at least 1, not {k} and {chunk}")
    k = min(k, len(candidates))
    rows, scores = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
    others = torch.from_numpy(candidates)
    for top in range(0, len(queries), chunk):
        some = torch.from_numpy(queries[top : top + chunk])
        best, where = torch.empty(len(some), 0), torch.empty(len(some), 0, dtype=torch.int64)
        for left in range(0, len(candidates), chunk):
            tile = some @ others[left : left + chunk].T
            top_scores, columns = tile.topk(min(k, tile.shape[1]), dim=1)
            best, where = torch.cat([best, top_scores], 1), torch.cat([where, columns + left], 1)
            best, columns = best.topk(min(k, best.shape[1]), dim=1)
            where = where.gather(1, columns)
        rows[top : top + chunk], scores[top : top + chunk] = where.numpy(), best.numpy()
    return Nearest(rows, scores)


def mutual_knn(left: ArrayLike, right: ArrayLike, k: int = 10, chunk: int = 4096) -> float:
    """Mutual k-nearest-neighbour alignment of two spaces of the same n things (Huh et al. 2024, arXiv 2405.07987).

    left: [n, D], right: [n, E]; row i of both is the same thing, such as a picture and its caption. Any float dtype.
    The share of the k nearest rows of row i in one space that are among its k nearest in the other space, in the mean over i.
    Near is a great cosine; a row is not its own neighbour.

    Returns a number in [0, 1]: 1 for equal neighbourhoods, about `mutual_knn_chance(n, k)` for unrelated spaces. The number is
    the same with both sides exchanged, and after a rotation or a scaling of one space. The widths may differ.
    Memory is O(chunk^2 + n k) beside the rows. Raises ValueError for unequal numbers of rows, n <= k, k < 1, and for a row that
    is zero or not finite.
    """
    rows = [_scale_to_unit(name, side) for name, side in (("left", left), ("right", right))]
    n = len(rows[0])
    if n != len(rows[1]) or not 1 <= k < n:
        raise ValueError(
            f"mutual_knn needs equally many rows, more than k >= 1, not {n} and {len(rows[1])} with k = {k}"
        )
    neighbours = (others(side, k, chunk) for side in rows)
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(*neighbours, strict=True)]))


def mutual_knn_chance(n: int, k: int = 10) -> float:
    """What `mutual_knn` has in the mean for two unrelated spaces of n rows: k / (n - 1)."""
    return k / (n - 1)


def others(rows: Floats, k: int, chunk: int) -> Ints:
    """The k nearest rows of each row, without the row itself: int64 [n, k]."""
    near = nearest(rows, rows, k + 1, chunk).rows
    itself = near == np.arange(len(rows))[:, None]
    itself[~itself.any(axis=1), -1] = True  # rows equal to it stand in its place: the last of them is dropped
    return np.asarray(near[~itself].reshape(len(rows), k))


def _scale_to_unit(name: str, array: ArrayLike) -> Floats:
    """`array` [n, D] as contiguous float32 rows of unit length. Raises ValueError for a row without a direction."""
    rows = np.asarray(array, np.float64)
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    if rows.ndim != 2 or not np.isfinite(length).all() or not length.all():
        raise ValueError(f"{name}: rows [n, D] that are finite and not zero are needed")
    return np.ascontiguousarray(rows / length, np.float32)
