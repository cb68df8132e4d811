"""Arithmetic of embeddings, by numpy alone: unit length, narrower vectors, smaller numbers, and the shift between modalities."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

PRECISIONS = ("float32", "float16", "int8", "binary")


def scale_to_unit(rows: NDArray[np.floating[Any]]) -> Floats:
    """Scale rows to unit length: float [n, D] to float32 [n, D]. A row of zeros becomes a row of equal numbers."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    filled = np.where(length > 0, rows, 1.0)
    return np.asarray(filled / np.linalg.norm(filled, axis=1, keepdims=True), np.float32)


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


def shift_mean(images: Floats, image_mean: Floats, text_mean: Floats) -> Floats:
    """Move image vectors by the distance of two means, [D] each, and scale them to unit length (Liang et al. 2022)."""
    moved = images - image_mean + text_mean
    return np.asarray(moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12), np.float32)
