"""Pictures of any form to vectors, batch by batch, with the reason for each picture that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from nev.config.model_spec import ModelSpec
from nev.data.decode import BadImage
from nev.inference.forward import Embed
from nev.inference.pictures import Square, read_squares
from nev.ops.vectors import Floats


def embed_pictures(
    items: Iterable[Any], spec: ModelSpec, embed: Embed, batch_size: int, strict: bool, advance: Callable[[int], object]
) -> tuple[Floats, list[str]]:
    """Embed pictures: float32 [n, D], zeros for bad pictures; and why a picture is bad, else empty.

    items: pictures in the forms of `Model.encode_image`.
    embed: uint8 [b, S, S, 3] to float32 [b, D].
    strict: raise BadImage for the first bad picture.
    advance: called with the number of pictures of each batch.
    """
    parts, reasons = [np.zeros((0, spec.width), np.float32)], list[str]()
    for squares in read_squares(items, spec.image_size, spec.limits, batch_size):
        if strict:
            _raise_first([square.reason for square in squares], len(reasons))
        vectors, new = encode_squares(squares, embed, spec.width)
        if strict:
            _raise_first(new, len(reasons))
        parts.append(vectors)
        reasons += new
        advance(len(squares))
    return np.concatenate(parts), reasons


def encode_squares(squares: Sequence[Square], embed: Embed, width: int) -> tuple[Floats, list[str]]:
    """Vectors, zeros for bad pictures; and why pictures are bad, else empty."""
    reasons = [square.reason for square in squares]
    good = [n for n, reason in enumerate(reasons) if not reason]
    out = np.zeros((len(squares), width), np.float32)
    if good:
        out[good] = embed(np.stack([squares[n].pixels for n in good]))
        for n in np.flatnonzero(~np.isfinite(out).all(axis=1)):
            out[n], reasons[n] = 0, "the model gives no finite vector for it"
    return out, reasons


def _raise_first(reasons: Sequence[str], start: int) -> None:
    """Raise BadImage for the first bad picture. start: number of the first picture."""
    for number, reason in enumerate(reasons, start):
        if reason:
            raise BadImage(f"picture {number}: {reason} (bad='mask' would leave such pictures out)")
