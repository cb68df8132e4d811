"""The nearest candidates of every query, in tiles."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

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
