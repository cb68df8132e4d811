"""The schema of an experiment's pictures and captions: the section `data`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from nev.config.base import ConfigError, Deviation, Location, Positive, PositiveShare, Section, Share

Ratio = Annotated[float, Field(gt=0.0, le=1e3)]
Factor = Annotated[float, Field(ge=1e-6, le=1e6)]


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


class TrainSet(Section):
    """One of several sets to train on."""

    path: Location
    """Shards: a folder, or `s3://bucket/prefix`."""
    weight: Factor | None = None
    """Share of this set in the rows of the run, up to a factor: weights 3 and 1 are 75 and 25 %. All sets have one, or none."""
    epochs: Factor | None = None
    """Epochs of this set in an epoch of the run: 2 for each row twice. null, where no set has a weight: 1."""
    columns: Columns | None = None
    """Column names of the shards. null: `data.columns`."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name in metrics. null: the part of the path that tells the sets apart."""


class DataSet(NamedTuple):
    """Shards that are read: a location, and the names of their columns."""

    location: str
    columns: Columns


def _list_sets(value: Any) -> Any:
    """A list with a plain location in it as a list of sets. Raises ValueError for a mapping, and for what is no set."""
    if isinstance(value, Mapping):
        raise ValueError("a location, or a list of sets, is needed: - {path: ..., weight: ...}")
    if isinstance(value, list | tuple):
        if wrong := [item for item in value if not isinstance(item, str | Mapping | TrainSet)]:
            raise ValueError(f"{wrong[0]!r} is no set: a location, or {{path: ..., weight: ...}}, is needed")
        return [{"path": item} if isinstance(item, str) else item for item in value]
    return value


def _tag_sets(value: Any) -> str:
    return "<sets>" if isinstance(value, list | tuple) else "<location>"


TrainSets = Annotated[
    Annotated[Location, Tag("<location>")] | Annotated[tuple[TrainSet, ...], Tag("<sets>")],
    Discriminator(_tag_sets),
    BeforeValidator(_list_sets),
]


class Data(Section):
    """Where the pictures are, and how they become uint8 arrays of (image_size, image_size, 3)."""

    train: TrainSets
    """Shards to train on: a folder, or `s3://bucket/prefix`, of parquet files or tars. Several sets in shares are a list of
    `path`, `weight` or `epochs`, `columns` and `name`.
    """
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
    streams: Positive = 1
    """Streams of blocks, each for an equal part of the workers. One hands out some 280 blocks a second; `nev plan` says where a
    run needs more.
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

    @property
    def train_sets(self) -> tuple[DataSet, ...]:
        """The sets to train on."""
        if isinstance(self.train, str):
            return (DataSet(self.train, self.columns),)
        return tuple(DataSet(each.path, each.columns or self.columns) for each in self.train)

    @property
    def sets(self) -> tuple[DataSet, ...]:
        """The sets to train on, and the set to validate on."""
        return (*self.train_sets, *([DataSet(self.val, self.columns)] if self.val else []))

    def only_set(self, command: str) -> DataSet:
        """The one set to train on. Raises ConfigError where `data.train` lists several. command: for the message."""
        if not isinstance(self.train, str):
            raise ConfigError(f"{command} takes one set, and data.train is a list: give one with --set data.train=PATH")
        return self.train_sets[0]

    @property
    def set_names(self) -> tuple[str, ...]:
        """The names of the sets of a mixture; none for one set."""
        if isinstance(self.train, str):
            return ()
        names = distinct_names([each.path for each in self.train])
        return tuple(each.name or name for each, name in zip(self.train, names, strict=True))

    @property
    def by_weight(self) -> bool:
        """Whether the shares of a mixture are weights, so that the run has no epochs."""
        return not isinstance(self.train, str) and self.train[0].weight is not None

    @property
    def factors(self) -> tuple[float, ...]:
        """The weights of a mixture's sets, or their epochs; (1.0,) for one set."""
        if isinstance(self.train, str):
            return (1.0,)
        return tuple((each.weight if self.by_weight else each.epochs) or 1.0 for each in self.train)

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if isinstance(self.train, str):
            return self
        if not self.train:
            raise ValueError("train: list one set at least")
        with_weight = [each.weight is not None for each in self.train]
        if any(with_weight) and (not all(with_weight) or any(each.epochs for each in self.train)):
            raise ValueError("train: give every set a weight, or none: a set without a weight has epochs")
        self.refuse_equal_names()
        return self

    def refuse_equal_names(self) -> None:
        """Raise ConfigError where two sets of a mixture have one name."""
        names = self.set_names
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"train: two sets have the name {twice!r}: give each another name (name)")


def distinct_names(paths: list[str]) -> list[str]:
    """The last part of each path that tells them all apart, such as `coco` of s3://bucket/coco/train; else a number each."""
    folders = [
        path.rpartition("/")[0] if path.endswith(".tar") else path for path in paths
    ]  # patterns of tars name nothing
    parts = [[part for part in PurePosixPath(folder).parts if part.strip("/:")] for folder in folders]
    for depth in range(1, min(map(len, parts)) + 1):
        names = [re.sub(r"[^A-Za-z0-9._-]+", "_", each[-depth]).lstrip("._-") for each in parts]
        if all(names) and len(set(names)) == len(names):
            return names
    return [f"set{number}" for number in range(1, len(paths) + 1)]
