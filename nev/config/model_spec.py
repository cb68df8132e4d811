"""The schema of `nev.json`, which every exported model has: all that decides a vector, but the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from nev.common.errors import NevError
from nev.common.version import __version__
from nev.config.base import ConfigError, Deviation, Positive, Section
from nev.config.data import Limits
from nev.config.file import parse
from nev.config.model import Text, Vision

SPEC_FILE = "nev.json"
FORMAT = 1
BESIDE = "./"  # beginning of an encoder's name that is a folder beside nev.json, and no name on the hub


class ModelError(NevError, ValueError):
    """A model that cannot be opened. The message says what is missing or wrong, where, and what to do."""


class Calibration(Section):
    """The means of a validation set's vectors, by which lists of pictures and texts are ranked (Liang et al. 2022)."""

    image_mean: tuple[float, ...]
    """Mean of the pictures' unit vectors."""
    text_mean: tuple[float, ...]
    """Mean of the captions' unit vectors."""


class Training(Section):
    """Where the weights come from."""

    step: int
    """Updates that the model has seen."""
    data: str | None = None
    """Fingerprint of the training set."""
    global_batch: int | None = None
    """Pairs of a step."""
    metrics: dict[str, float] = Field(default={})
    """Scores on the validation set, with the ends of their 95 % intervals."""
    settings: dict[str, Any] = Field(default={})
    """Loss, optimiser and augmentation."""


class ModelSpec(Section):
    """A trained pair of towers."""

    format: int = FORMAT
    """Version of this schema."""
    nev: str = __version__
    """Version of nev that wrote the model."""
    name: str
    """Name of the model."""
    vision: Vision
    """Vision tower."""
    image_size: Positive
    """Side S of the square that the vision tower sees, in pixels."""
    mean: tuple[float, float, float]
    """Mean of red, green and blue for normalisation, in 0 to 1."""
    std: tuple[Deviation, Deviation, Deviation]
    """Standard deviation of red, green and blue for normalisation, in 0 to 1."""
    limits: Limits = Limits()
    """Limits of one encoded image."""
    width: Positive
    """Width D of an embedding."""
    vision_fingerprint: str | None = None
    """Fingerprint of the vision tower and its pre-processing. null: computed when the model is opened."""
    text: Text
    """Text tower. An encoder `./text` lies in the folder `text` beside this file."""
    text_fingerprint: str | None = None
    """Fingerprint of the text tower. null: not known, as for released weights."""
    document_fingerprint: str | None = None
    """Fingerprint of the text tower as it embeds documents (`nev.Model.text_fingerprint`). null: computed from the text tower."""
    weights: dict[str, dict[str, str]] = Field(default={})
    """Files of the vision tower's weights: beginnings of names in the file, and what they are in `ImageEncoder`."""
    prompts: dict[str, str]
    """Text put before a `query`, and before a `document`."""
    logit_scale: float = Field(gt=0)
    """1 / temperature."""
    calibration: Calibration | None = None
    """Means for lists of pictures and texts. null: the model was not validated."""
    training: Training | None = None
    """Origin of the weights. null: not known, as for released weights."""

    @model_validator(mode="after")
    def _means_of_this_width(self) -> Self:
        means = self.calibration
        if means and not len(means.image_mean) == len(means.text_mean) == self.width:
            raise ValueError(
                f"calibration: means of {len(means.image_mean)} and {len(means.text_mean)} numbers, and width is {self.width}"
            )
        return self


def read_spec(folder: Path) -> ModelSpec:
    """Read `nev.json`. Raises ModelError where it is damaged, of another version of nev, or names a trunk outside of timm."""
    file = folder / SPEC_FILE
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        version = raw.get("format")
    except (ValueError, AttributeError, OSError) as error:
        raise ModelError(f"{file}: damaged ({error}). Copy or export the model again.") from error
    if version != FORMAT:
        raise ModelError(
            f"{file}: format {version}, and nev {__version__} reads format {FORMAT}: install the nev that wrote it"
        )
    try:
        spec = parse(ModelSpec, raw, where=str(file))
    except ConfigError as error:
        raise ModelError(str(error)) from error
    if ":" in spec.vision.trunk:  # timm would ask a hub for such a trunk, or read another folder
        raise ModelError(
            f"{file}: vision.trunk is {spec.vision.trunk!r}. An export names an architecture of timm, and brings the weights: "
            "export the model again"
        )
    return spec


def find_inside(folder: Path, name: str) -> Path:
    """A file or folder that nev.json names. Raises ModelError for a name that leads out of the folder.

    Links are followed: all files in the cache of the hub are links.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ModelError(f"{folder / SPEC_FILE}: {name!r} leads out of its folder")
    return folder / name
