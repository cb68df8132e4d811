"""Arithmetic of embeddings, by numpy alone: unit length, narrower vectors, smaller numbers, and the shift between modalities."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

PRECISIONS = ("float32", "float16", "int8", "binary")


def scale_to_unit(rows: NDArray[np.floating[Any]]) -> Floats:
    """Scale rows to unit length: float [n, D] to float32 [n, D].

    A row of zeros stays zeros: its cosine with any row is 0. A row with NaN or infinite numbers gets NaN.
    """
    with np.errstate(invalid="ignore"):  # infinite / infinite
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.asarray(rows / np.where(length == 0, 1, length), np.float32)


def are_usable(rows: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """Whether rows, [n, D], have a direction: bool [n]. False for rows of zeros, and for rows with NaN or infinite numbers."""
    usable: NDArray[np.bool_] = np.isfinite(rows).all(axis=1) & (rows != 0).any(axis=1)
    return usable


def truncate(rows: Floats, width: int) -> Floats:
    """The first `width` numbers of each row, scaled to unit length (Matryoshka, arXiv 2205.13147)."""
    return scale_to_unit(rows[:, :width])


def round_to(rows: Floats, precision: str) -> NDArray[Any]:
    """Store unit vectors, float32 [n, D], in fewer bytes.

    precision:
    `float32`: as given.
    `float16`: half precision.
    `int8`: each row times 127 over its own largest number. Compare by cosine, since lengths differ.
    `binary`: signs, eight to a byte, uint8 [n, ceil(D / 8)]. Compare by Hamming distance.
    """
    if precision == "float16":
        return rows.astype(np.float16)
    if precision == "int8":
        largest = np.abs(rows).max(axis=1, keepdims=True)
        return np.asarray(np.round(rows * (127 / np.where(largest > 0, largest, 1))), np.int8)
    if precision == "binary":
        return np.packbits(rows > 0, axis=1)
    return rows


def restore(stored: NDArray[Any], precision: str, width: int) -> Floats:
    """The unit vectors, float32 [n, width], of what `round_to` has stored, [n, k]. Of signs, numbers of one size."""
    if precision == "binary":
        stored = np.unpackbits(stored, axis=1, count=width).astype(np.int8) * 2 - 1
    return stored if stored.dtype == np.float32 else scale_to_unit(stored.astype(np.float32))


def shift_mean(images: Floats, image_mean: Floats, text_mean: Floats) -> Floats:
    """Move image vectors by the distance of two means, [D] each, and scale them to unit length (Liang et al. 2022).

    A row of zeros, which stands for a bad picture, stays zeros.
    """
    return scale_to_unit(np.where((images == 0).all(axis=1, keepdims=True), 0, images - image_mean + text_mean))
