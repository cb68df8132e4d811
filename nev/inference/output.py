"""The form in which vectors are given out: width, number format, numpy or torch."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from nev.ops.vectors import PRECISIONS, Floats, round_to, truncate

VectorFormat = Literal["float32", "float16", "int8", "binary"]
Numpy = Literal["numpy"]
Torch = Literal["torch"]


class Form(TypedDict, total=False):
    """Arguments that do not change the type of what `encode_image` and `encode_text` return."""

    batch_size: int
    width: int | None
    precision: VectorFormat
    progress: bool | None


def check_output(total: int, width: int | None, precision: str, output: str, batch_size: int) -> None:
    """Raise ValueError for a form that vectors of `total` numbers cannot have, and for an empty batch."""
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: at least 1")
    if width is not None and not 0 < width <= total:
        raise ValueError(f"width {width}: the model's vectors have {total} numbers")
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: it is one of {', '.join(PRECISIONS)}")
    if output not in ("numpy", "torch"):
        raise ValueError(f"output {output!r}: it is numpy or torch")


def finish(rows: Floats, width: int | None, precision: str, output: str, single: bool) -> Any:
    """Vectors in the form that the caller chose. single: give the only row, [D], and not [1, D].

    rows: float32 [n, D], of unit length, or zeros for a bad picture; these stay zeros.
    """
    if width is not None and width < rows.shape[1]:
        rows = truncate(rows, width)
    stored = round_to(rows, precision)
    stored = stored[0] if single else stored
    return torch.from_numpy(stored) if output == "torch" else stored


def to_numpy(items: Any) -> NDArray[Any]:
    """An array of numpy or torch (on any device, of any type, with or without a graph), or numbers, as an array of numpy."""
    if isinstance(items, torch.Tensor):
        items = items.detach().cpu()
        items = items.float() if items.is_floating_point() else items
    return np.asarray(items)


def as_vectors(items: Any, what: str, total: int) -> Floats | None:
    """Vectors, float [D] or [n, D] of numpy or torch, as float32 [n, D]. None for what is to be embedded.

    what: the argument, for messages. total: D.
    Raises ValueError for vectors of another width, TypeError for arrays [n, m] of integers: vectors in fewer bits look like them.
    """
    kind, dimensions = str(getattr(items, "dtype", "")), len(getattr(items, "shape", ()))
    if "int" in kind and dimensions in (1, 2):
        raise TypeError(
            f"{what}: an array {list(items.shape)} of {kind} is no list of vectors and no list of pictures. Give float vectors "
            "(`.astype('float32')` for int8; binary ones cannot be ranked), or a grey picture in a list"
        )
    if "float" not in kind:
        return None
    rows = np.atleast_2d(to_numpy(items)).astype(np.float32)
    if not rows.size:
        return np.zeros((0, total), np.float32)
    if rows.ndim != 2 or rows.shape[1] != total:
        raise ValueError(f"{what}: vectors of this model have {total} numbers, and this is an array {list(rows.shape)}")
    return rows
