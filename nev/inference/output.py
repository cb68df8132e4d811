"""The form in which vectors are given out: width, number format, numpy or torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nev.ops.vectors import PRECISIONS, Floats, round_to, truncate


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


def finish(rows: Floats, width: int | None, precision: str, output: str, one: bool) -> Any:
    """Vectors in the form that the caller chose. one: give the only row, [D], and not [1, D].

    rows: float32 [n, D], of unit length, or zeros for a bad picture; these stay zeros.
    """
    if width is not None and width < rows.shape[1]:
        rows = np.where(rows.any(axis=1, keepdims=True), truncate(rows, width), np.float32(0))
    stored = round_to(rows, precision)
    stored = stored[0] if one else stored
    return torch.from_numpy(stored) if output == "torch" else stored


def as_vectors(items: Any) -> Floats | None:
    """Vectors, float [D] or [n, D] of numpy or torch, as float32 [n, D]. None for anything else."""
    if "float" not in str(getattr(items, "dtype", "")):
        return None
    if isinstance(items, torch.Tensor):
        items = items.detach().float().cpu().numpy()
    return np.atleast_2d(np.asarray(items, np.float32))
