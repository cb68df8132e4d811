"""The arrays that a task is scored from: pictures, texts, and which text belongs to which picture."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.config.base import ConfigError
from nev.eval.metrics.ranks import Floats, Ints


class Embedded(NamedTuple):
    """The pictures of a set in the shared space, in the order of the set.

    images: float32 [n, D], rows of unit length.
    valid: bool [n], False where the picture cannot be decoded; that row of `images` means nothing.
    labels: int64 [n], -1 where the class is unknown.
    """

    images: NDArray[np.float32]
    valid: NDArray[np.bool_]
    labels: NDArray[np.int64]


class Texts(NamedTuple):
    """The texts of a set in the shared space; None for texts that are not needed, or not known yet.

    classes: float32 [C, D], rows of unit length.
    captions: float32 [m, D], rows of unit length.
    owner: int64 [m], the row of the set that a caption describes.
    """

    classes: NDArray[np.float32] | None = None
    captions: NDArray[np.float32] | None = None
    owner: NDArray[np.int64] | None = None


class Pairs(NamedTuple):
    """Pictures that can be decoded and have a caption, and their captions.

    images: float32 [n, D]. texts: float32 [m, D]. owner: int64 [m], the row of `images` that a text describes.
    """

    images: Floats
    texts: Floats
    owner: Ints


def make_pairs(embedded: Embedded, texts: Texts) -> Pairs:
    """Pair pictures and captions. Raises ConfigError where no picture that can be decoded has a caption."""
    assert texts.captions is not None
    assert texts.owner is not None
    paired = np.isin(np.arange(len(embedded.valid)), texts.owner) & embedded.valid
    if not paired.any():
        raise ConfigError("no row has a caption and a picture that can be decoded")
    usable, position = paired[texts.owner], np.cumsum(paired) - 1
    return Pairs(embedded.images[paired], texts.captions[usable], position[texts.owner[usable]])
