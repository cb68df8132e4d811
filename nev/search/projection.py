"""A map of the space: the plane in which sampled vectors vary most (PCA), for texts, pictures and queries alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nev.ops.vectors import Floats, scale_to_unit


@dataclass(frozen=True)
class Projection:
    """A plane of the space.

    mean: [D]. axes: [2, D], of unit length, zeros where the vectors have no such direction.
    explained: the share of the variance along each axis, in 0 to 1.
    """

    mean: Floats
    axes: Floats
    explained: tuple[float, float]

    def project(self, vectors: NDArray[np.floating]) -> Floats:
        """Positions of vectors, [n, D], on the map: float32 [n, 2]."""
        return np.asarray((scale_to_unit(vectors) - self.mean) @ self.axes.T, np.float32)


def fit_projection(vectors: NDArray[np.floating]) -> Projection:
    """The map of vectors, [n, D], by PCA. Vectors are scaled to unit length. The same vectors, in any order, give the same map."""
    rows = scale_to_unit(vectors)
    width = rows.shape[1]
    mean = rows.mean(axis=0) if len(rows) else np.zeros(width, np.float32)
    _, lengths, axes = np.linalg.svd(rows - mean, full_matrices=False)
    axes, lengths = axes[:2], lengths[:2] if len(rows) > 1 else lengths[:2] * 0
    total = float(np.square(rows - mean).sum())
    shares = [float(length**2) / total if total else 0.0 for length in lengths]
    # The sign of an axis is arbitrary: the largest number of each is positive.
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])
    missing = 2 - len(axes)
    full = np.concatenate([axes * signs[:, None], np.zeros((missing, width), np.float32)])
    return Projection(mean, np.asarray(full, np.float32), (*shares, 0.0, 0.0)[:2])
