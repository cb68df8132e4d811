"""What a server computes with: pictures and sentences to vectors, whatever runs the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.config.data import Limits
from nev.ops.vectors import Floats

if TYPE_CHECKING:
    from nev.inference.model import Kind  # imports torch, which ONNX Runtime does without

CANARY = "a photo of a dog"


class Sentence(NamedTuple):
    """A text, and whether it is embedded as a `query` or as a `document`."""

    text: str
    kind: Kind


class TextVector(NamedTuple):
    """The vector of a sentence.

    vector: float32 [D], of unit length. tokens: that the encoder saw, prompt and special tokens included.
    cut: the sentence is longer than the encoder's longest text, and its end was left out.
    """

    vector: Floats
    tokens: int
    cut: bool


@dataclass(frozen=True)
class Engine:
    """A model that is ready to run. `open_engine` opens one.

    name: of the model. runtime: what computes, and on which device.
    precision: of the vision tower. Texts are float32 always, since their vectors have to be those that an index has already.
    width: D. image_size: S, in pixels. limits: of one encoded picture.
    fingerprint, text_fingerprint: as those of `nev.Model`; None where an export does not have them.
    encode_images: uint8 [b, S, S, 3] to float32 [b, D] of unit length. Called by one thread at a time.
    encode_texts: called by one thread at a time, and beside `encode_images`.
    """

    name: str
    runtime: str
    precision: str
    width: int
    image_size: int
    limits: Limits
    fingerprint: str | None
    text_fingerprint: str | None
    encode_images: Callable[[NDArray[np.uint8]], Floats]
    encode_texts: Callable[[Sequence[Sentence]], list[TextVector]]
