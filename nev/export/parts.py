"""What all exports share: the options, `nev.json`, the text tower's folder, and the comparison with the model itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.config.model import Vision
from nev.config.model_spec import BESIDE, SPEC_FILE, ModelSpec
from nev.inference.forward import make_embedder
from nev.inference.model import Model
from nev.ops.vectors import Floats

TEXT_FOLDER = "text"
SENTENCES = (
    "a photo of a dog",
    "two red circles above a blue square",
    "",
    "Zwei Kinder spielen im Schnee, 1999.",
    "longer than most text encoders read, " * 90,
)
FP32 = 1e-5  # largest difference of any number of a unit vector
FROZEN = 1e-4  # the same behind a locked trunk: rounded to float16, a feature that moves by 1e-7 can move by 5e-4
FP16, INT8 = 1e-5, 0.02  # largest 1 - cosine
FROZEN_FP16 = 1e-4  # the same as FP16 behind a locked trunk, for the reason of FROZEN


@dataclass(frozen=True)
class Options:
    """Options of an export.

    text: the text tower is written, too. False: the export names it.
    license: SPDX name of the weights' licence, for the model card; None where it is not known.
    hub: OWNER/NAME of the repository on the hub that the folder is for, for the model card; None for no hub.
    """

    text: bool = True
    license: str | None = None
    hub: str | None = None


class Check(NamedTuple):
    """A comparison of what a consumer computes with what the model computes.

    consumer: the tool. what: the part that was compared.
    difference: largest difference of any number of a unit vector. gap: largest 1 - cosine.
    limit: of `gap` where `by_cosine`, else of `difference`.
    left_out: what was compared did not pass, and is not part of the export.
    """

    consumer: str
    what: str
    difference: float
    gap: float
    limit: float
    by_cosine: bool = False
    left_out: bool = False

    @property
    def passed(self) -> bool:
        """Whether the vectors agree."""
        return (self.gap if self.by_cosine else self.difference) <= self.limit

    def __str__(self) -> str:
        measure = f"1 - cosine {self.gap:.1e}" if self.by_cosine else f"difference {self.difference:.1e}"
        return f"{self.consumer}, {self.what}: {measure} (limit {self.limit:.0e})"


def compare(
    consumer: str, what: str, theirs: NDArray[np.floating[Any]], ours: Floats, limit: float, by_cosine: bool = False
) -> Check:
    """Compare unit vectors of a consumer, float [n, D], with the model's, float32 [n, D]."""
    theirs = np.asarray(theirs, np.float64)
    if theirs.shape != ours.shape or not np.isfinite(theirs).all():
        return Check(consumer, what, float("inf"), float("inf"), limit, by_cosine)
    cosines = (
        (theirs * ours).sum(axis=1) / np.linalg.norm(theirs, axis=1) / np.linalg.norm(ours.astype(np.float64), axis=1)
    )
    return Check(consumer, what, float(np.abs(theirs - ours).max()), float(1 - cosines.min()), limit, by_cosine)


def picture_limit(model: Model) -> float:
    """The largest difference of any number of a picture's unit vector between two float32 computations."""
    return FROZEN if model.spec.vision.lock else FP32


def sample_pictures(size: int, count: int = 5) -> NDArray[np.uint8]:
    """Pictures to compare with, uint8 [n, S, S, 3]: colour waves of several scales, with noise."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:size, 0:size] / size
    waves = [
        np.sin(2 * np.pi * (random.integers(0, 6) * x + random.integers(0, 6) * y) + random.random() * 6)
        for _ in range(3 * count)
    ]
    pixels = np.stack(waves).reshape(count, 3, size, size).transpose(0, 2, 3, 1) * 100 + 128
    return np.asarray((pixels + random.normal(0, 12, pixels.shape)).clip(0, 255), np.uint8)


def embed_squares(model: Model, squares: NDArray[np.uint8]) -> Floats:
    """The model's own vectors of squares, uint8 [n, S, S, 3]: float32 [n, D]."""
    return np.asarray(make_embedder(model.vision, model.spec.mean, model.spec.std, model.device)(squares), np.float32)


def normalise_squares(model: Model, squares: NDArray[np.uint8]) -> Floats:
    """Squares, uint8 [n, S, S, 3], as other tools feed them: float32 [n, 3, S, S]."""
    mean, std = (np.asarray(numbers, np.float32) for numbers in (model.spec.mean, model.spec.std))
    return np.ascontiguousarray(((squares / np.float32(255) - mean) / std).transpose(0, 3, 1, 2), np.float32)


def make_image_processor(spec: ModelSpec) -> Any:
    """The image processor of transformers that shows the tower the same pixels as nev does.

    Only Perceiver's cuts the centre square out *before* it resizes, as the evaluation view does. The numbers are the model's own.
    """
    from transformers import PerceiverImageProcessor

    side = {"height": spec.image_size, "width": spec.image_size}
    return PerceiverImageProcessor(
        size=side, crop_size=side, image_mean=list(spec.mean), image_std=list(spec.std), do_convert_rgb=True
    )


def describe_vision(model: Model) -> Vision:
    """The section `vision` of an export: without paths of this machine, and without a trunk that a hub would have to bring."""
    vision, trunk = model.spec.vision, model.vision.trunk
    name = str(trunk.pretrained_cfg["architecture"]) if ":" in vision.trunk else vision.trunk
    # A locked trunk needs to name weights. timm's own go by the trunk's name.
    weights = (vision.weights and PurePath(vision.weights).name) or name if vision.lock else None
    return vision.model_copy(update={"trunk": name, "pretrained": False, "weights": weights})


def write_spec(model: Model, folder: Path, weights: dict[str, dict[str, str]], text_folder: str | None) -> ModelSpec:
    """Write `nev.json`: the model without the paths of this machine.

    weights: as `ModelSpec.weights`. text_folder: where the text tower lies in `folder`; None where it is not written.
    """
    spec = model.spec
    text = spec.text
    if text_folder:
        text = text.model_copy(update={"encoder": BESIDE + text_folder, "revision": None})
    elif text.encoder.startswith((".", "/", "~")) or Path(text.encoder).is_dir():
        text = text.model_copy(update={"encoder": PurePath(text.encoder).name})  # `nev.load(..., text=...)` says where
    # A text tower that was trained is not the one that its name brings.
    trained = spec.training is not None and spec.training.settings.get("lock", "text") != "text"
    changes = {
        "vision": describe_vision(model),
        "vision_fingerprint": model.fingerprint,
        "text": text.model_copy(update={"trust_remote_code": False}),
        "weights": weights,
        "text_fingerprint": model.text.fingerprint if text_folder or trained else spec.text_fingerprint,
        "document_fingerprint": model.text_fingerprint if text_folder or trained else spec.document_fingerprint,
    }
    written = spec.model_copy(update=changes)
    raw = json.dumps(written.model_dump(mode="json"), indent=1)
    (folder / SPEC_FILE).write_text(raw + "\n", encoding="utf-8")
    return written


def write_text_tower(model: Model, folder: Path) -> None:
    """Write the text tower as transformers and sentence-transformers read it: model, tokenizer, longest text."""
    tower: Any = model.text.model
    tower.save_pretrained(folder)
    model.text.tokenizer.save_pretrained(folder)
    longest = {"max_seq_length": model.text.longest, "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps(longest), encoding="utf-8")
