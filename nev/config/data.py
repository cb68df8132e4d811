"""The schema of an experiment's pictures and captions: the section `data`."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from nev.config.base import Location, Positive, Section, Share


class Columns(Section):
    """Column names of a shard. `None` means: recognise it among the usual names."""

    uid: str | None = None
    image: str | None = None
    caption: str | None = None
    label: str | None = None


class Jitter(Section):
    """Colour jitter: factors from 1 - x to 1 + x, and a turn of the hue from -x to x (0.5 is half the circle)."""

    brightness: Share = 0.0
    contrast: Share = 0.0
    saturation: Share = 0.0
    hue: float = Field(default=0.0, ge=0.0, le=0.5)


class Augment(Section):
    """RandomResizedCrop (Szegedy et al. 2014), flip, colour jitter, auto-augment, drawn from (seed, epoch, uid).

    `auto` is a name as timm has them: rand-m9-mstd0.5-inc1 (RandAugment, Cubuk et al. 2019), augmix-m3-w3, original, ...
    """

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    jitter: Jitter | None = None
    auto: str | None = None

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must satisfy 0 < low <= high <= 1, not {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must satisfy 0 < low <= high, not {self.ratio}")
        return self


class Limits(Section):
    """What one encoded image may cost. Checked before it is decoded."""

    max_bytes: Positive = 32 * 2**20
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 64_000_000  # beyond that Pillow takes it for a bomb


class Data(Section):
    """Where the pictures are and how they become uint8 arrays of (image_size, image_size, 3).

    For ablations, of `train` alone: `used_rows`, the share of each row group that is used, its first rows; `permuted_captions`,
    the share of rows that have another row's caption, the same one in every epoch.
    """

    train: Location
    val: Location | None = None
    image_size: Positive = 224
    block_rows: Positive = 256
    columns: Columns = Columns()
    augment: Augment = Augment()
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    limits: Limits = Limits()
    max_bad_share: Share = 0.05
    used_rows: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    permuted_captions: Share = 0.0
