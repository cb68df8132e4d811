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
    """The map of vectors, [n, D], by PCA of their unit vectors. Their order does not matter; fewer than three span no plane."""
    rows = scale_to_unit(vectors)
    width = rows.shape[1]
    if len(rows) < 2:
        return Projection(rows.sum(axis=0), np.zeros((2, width), np.float32), (0.0, 0.0))
    mean = rows.mean(axis=0)
    _, lengths, directions = np.linalg.svd(rows - mean, full_matrices=False)
    axes, variances = np.zeros((2, width), np.float32), np.zeros(2)
    axes[: len(directions[:2])], variances[: len(lengths[:2])] = directions[:2], lengths[:2] ** 2
    # The sign of an axis is arbitrary: its largest number is positive.
    signs = np.sign(axes[[0, 1], np.abs(axes).argmax(axis=1)])
    first, second = variances / max(float(np.square(lengths).sum()), 1e-12)
    return Projection(mean, axes * signs[:, None], (float(first), float(second)))
