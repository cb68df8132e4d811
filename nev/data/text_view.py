"""What a run may do to the texts that it trains on, for ablations: give rows a wrong caption, take away the mean, add noise.

All three depend on (seed, row) or (seed, epoch, uid) alone, so a resumed run and one with more workers see the same texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TextView:
    """permuted: share of rows with another row's caption; mean: float32 [D], taken away from each vector; noise: length of the
    noise that is added to a unit vector, on average. `mean` and `noise` are after collapse and corrupt of Zhang et al. 2024 (C3),
    for training alone.
    """

    permuted: float = 0.0
    mean: NDArray[np.float32] | None = None
    noise: float = 0.0

    def of(
        self, vectors: NDArray[np.float16], seed: int, epoch: int, uids: Sequence[str] | NDArray[Any]
    ) -> NDArray[np.float16]:
        """Unit float16 [n, D] as they are trained on, unit again."""
        if self.mean is None and not self.noise:
            return vectors
        seen = vectors.astype(np.float32)
        if self.mean is not None:
            seen = unit(seen - self.mean)
        if self.noise:
            deviation = self.noise / np.sqrt(seen.shape[1])
            seen = unit(seen + deviation * np.stack([normal(seed, epoch, uid, seen.shape[1]) for uid in uids]))
        return seen.astype(np.float16)


OWN_TEXTS = TextView()


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1."""
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), np.float32)


def normal(seed: int, epoch: int, uid: str, width: int) -> NDArray[np.float32]:
    """Standard normal numbers of a row in an epoch (Box and Muller 1958), from bits that NumPy promises to keep."""
    uniform = (_bits(f"{seed}/{epoch}/text/{uid}", 2 * width) >> np.uint64(11)) * 2.0**-53
    length, angle = np.sqrt(-2 * np.log1p(-uniform[:width])), 2 * np.pi * uniform[width:]
    return np.asarray(length * np.cos(angle), np.float32)


def caption_rows(rows: int, permuted: float, seed: int, shard: int, group: int) -> NDArray[np.int64]:
    """Whose caption each row of a row group has: int64 [rows]. About a share `permuted` of them has that of another such row, the
    same one in every epoch; all others have their own.
    """
    keys = _bits(f"{seed}/captions/{shard}/{group}", rows)
    chosen = (
        np.flatnonzero(keys < np.uint64(min(permuted, 1 - 2.0**-53) * 2.0**64)) if permuted < 1 else np.arange(rows)
    )
    order = chosen[np.argsort(keys[chosen], kind="stable")]
    whose = np.arange(rows)
    whose[order] = np.roll(order, 1)
    return whose


def _bits(key: str, count: int) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return np.random.PCG64(np.random.SeedSequence(int.from_bytes(digest, "little"))).random_raw(count)
