"""The schema of an experiment's pictures and captions: the section `data`."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from nev.config.base import Deviation, Location, Positive, PositiveShare, Section, Share

Ratio = Annotated[float, Field(gt=0.0, le=1e3)]


class Columns(Section):
    """Column names of a shard. null: the column is recognised among the usual names."""

    uid: str | None = None
    """Column of the unique id: a string, a whole number or a UUID."""
    image: str | None = None
    """Column of the encoded image: bytes, or the Hugging Face struct with `bytes`."""
    caption: str | None = None
    """Column of the caption: a string, or a list of strings."""
    label: str | None = None
    """Column of the class label, a whole number."""


class Jitter(Section):
    """Colour jitter, as torchvision's ColorJitter draws it, in random order."""

    brightness: Share = 0.0
    """Range x of the brightness: a factor from 1 - x to 1 + x."""
    contrast: Share = 0.0
    """Range x of the contrast: a factor from 1 - x to 1 + x."""
    saturation: Share = 0.0
    """Range x of the saturation: a factor from 1 - x to 1 + x."""
    hue: float = Field(default=0.0, ge=0.0, le=0.5)
    """Range x of the hue: a turn from -x to x of the colour circle; 0.5 is half the circle."""


class Augment(Section):
    """Augmentation of training pictures, drawn from (seed, epoch, uid): crop, flip, jitter, auto-augment, in this order."""

    scale: tuple[PositiveShare, PositiveShare] = (0.9, 1.0)
    """Area of the random crop, from and to, as a share of the picture (RandomResizedCrop, Szegedy et al. 2014)."""
    ratio: tuple[Ratio, Ratio] = (3 / 4, 4 / 3)
    """Aspect ratio of the random crop, width / height, from and to."""
    flip: bool = False
    """Horizontal flip of every second picture, at random."""
    jitter: Jitter | None = None
    """Colour jitter. null: none."""
    auto: str | None = None
    """Automatic augmentation by timm's name: `rand-m9-mstd0.5-inc1` (RandAugment, Cubuk et al. 2019), `augmix-m3-w3`, `original`,
    and so on. null: none.
    """

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} goes from low to high, not from {low} to {high}")
        return self


class Limits(Section):
    """Limits of one encoded image, checked before a pixel is decoded."""

    max_bytes: Positive = 32 * 2**20
    """Most bytes of an encoded image."""
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 64_000_000
    """Most pixels of an image, width x height. The upper bound is the number from which Pillow suspects a decompression bomb."""


class Data(Section):
    """Where the pictures are, and how they become uint8 arrays of (image_size, image_size, 3)."""

    train: Location
    """Shards to train on: a folder, or `s3://bucket/prefix`, of parquet files."""
    val: Location | None = None
    """Shards to validate on. null: no validation."""
    image_size: Positive = 224
    """Side of the square that the vision tower sees, in pixels."""
    block_rows: Positive = 256
    """Rows of a block, R: what a worker gets at a time."""
    window: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """Row groups of an epoch's order whose rows are permuted together, and read by one task. 0: row groups are permuted, and rows
    keep their order in them. null: as many row groups as have some 1,024 rows, or six blocks where R divides few row groups.
    """
    columns: Columns = Columns()
    """Column names of the shards."""
    augment: Augment | None = Augment()
    """Augmentation of training pictures. null: none; a picture is resized, and its centre square is cropped, as in evaluation."""
    mean: tuple[Share, Share, Share] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of red, green and blue for normalisation, in 0 to 1. Default: OpenAI CLIP's."""
    std: tuple[Deviation, Deviation, Deviation] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of red, green and blue for normalisation, in 0 to 1. Default: OpenAI CLIP's."""
    limits: Limits = Limits()
    """Limits of one encoded image."""
    max_bad_share: Share = 0.05
    """Share of rows without a usable picture or caption past which the run stops."""
    used_rows: PositiveShare = 1.0
    """Share of each training row group that is used, its first rows. For ablations."""
    permuted_captions: Share = 0.0
    """Share of training rows that have the caption of another row of their row group, the same one in every epoch. For
    ablations.
    """
