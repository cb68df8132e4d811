"""Image sidecars: the features of a locked trunk beside each shard (`nev.data.sidecar`). Training then opens no picture.

The column `features` (binary) is float16 little-endian [views, *shape], row-major, and empty where a picture cannot be used.
`reason` (string) then says why. The key is a hash of the recipe: the trunk's fingerprint, and how a picture becomes pixels. View
v of a picture has the augmentation that a run without sidecars draws in epoch v. The metadata holds the recipe, the shape, the
number of views, and the mean and deviation of the features.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nev.common.errors import first_few
from nev.common.hashing import hash_recipe
from nev.config.data import Data
from nev.data.augment import seeded_fractions
from nev.data.index import Index
from nev.data.sidecar import Sidecars, check_sidecars, missing_sidecars, read_metadata, write_groups
from nev.storage.files import filesystem, join
from nev.storage.reading import DataError, read_errors_as_data_errors

FOLDER, COMMAND = "_image", "nev embed-images"
LAYOUT = 1  # version of the file's layout: another version gives another key
MOMENTS_ROWS = 64
SCHEMA = pa.schema([("uid", pa.string()), ("features", pa.binary()), ("reason", pa.string())])


class TrunkFacts(NamedTuple):
    """What a run's driver knows of its locked trunk.

    fingerprint: sha256, hex.
    shape: of one picture's features, (F,) or (T, F).
    """

    fingerprint: str
    shape: tuple[int, ...]


class Features(NamedTuple):
    """What a reader takes from image sidecars.

    recipe: of `image_recipe`.
    shape: of one picture's features, (F,) or (T, F).
    views: views of a picture, of which each epoch draws one.
    """

    recipe: dict[str, Any]
    shape: tuple[int, ...]
    views: int

    @property
    def numbers(self) -> int:
        """Numbers of one view of a picture."""
        return int(np.prod(self.shape))

    def sidecars(self, index: Index) -> Sidecars:
        """The image sidecars of a set of shards."""
        metadata = {"nev.recipe": json.dumps(self.recipe, sort_keys=True), "nev.shape": json.dumps(self.shape)}
        return Sidecars(index, FOLDER, hash_recipe(self.recipe), metadata, COMMAND)

    def draw_views(self, seed: int, epoch: int, uids: list[str]) -> NDArray[np.int64]:
        """The view of each picture in an epoch, drawn by (seed, epoch, uid): int64 [n]."""
        if self.views == 1:
            return np.zeros(len(uids), np.int64)
        return (np.array(seeded_fractions(seed, epoch, uids, "view")) * self.views).astype(np.int64)


def image_recipe(trunk: str, column: str | None, data: Data, seed: int, training: bool) -> dict[str, Any]:
    """All that the features of a picture depend on, as plain data.

    trunk: fingerprint of the trunk.
    column: of the pictures in the shards.
    seed: of the augmentation.
    training: the view of training pictures; else the evaluation view.
    """
    augment = data.augment.model_dump(mode="json") if training and data.augment else None
    return {
        "layout": LAYOUT,
        "trunk": trunk,
        "column": column,
        "image_size": data.image_size,
        "mean": list(data.mean),
        "std": list(data.std),
        "limits": data.limits.model_dump(mode="json"),
        "augment": augment,
        "seed": seed if augment else None,
    }


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared differences from the mean, number by number: float64 [F] (Chan et al. 1979)."""

    count: int
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]

    @classmethod
    def of(cls, features: NDArray[np.float16]) -> Self:
        """The moments of features [..., F]."""
        rows = features.reshape(-1, features.shape[-1]).astype(np.float64)
        mean = rows.mean(0) if len(rows) else np.zeros(rows.shape[1])
        return cls(len(rows), mean, np.square(rows - mean).sum(0))

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets together."""
        count = self.count + other.count
        step, share = other.mean - self.mean, other.count / max(1, count)
        squares = self.squares + other.squares + step**2 * self.count * share
        return Moments(count, self.mean + step * share, squares)

    def to_text(self) -> str:
        """As a string, for the metadata of a sidecar."""
        return f"{self.count} {base64.b64encode(np.stack([self.mean, self.squares]).astype('<f8').tobytes()).decode()}"

    @classmethod
    def from_text(cls, text: str) -> Self:
        """The inverse of `to_text`."""
        count, _, encoded = text.partition(" ")
        mean, squares = np.frombuffer(base64.b64decode(encoded), "<f8").reshape(2, -1)
        return cls(int(count), mean, squares)


class FeatureRows(NamedTuple):
    """The features of a row group.

    uid: of each row, str [n].
    features: float16 [n, views, *shape].
    reason: why a row cannot be used, str [n]; empty for a row that can be used.
    """

    uid: list[str]
    features: NDArray[np.float16]
    reason: list[str]


def write_image_sidecar(sidecars: Sidecars, shard: int, views: int, groups: Iterator[FeatureRows]) -> None:
    """Write the image sidecar of a shard, complete or not at all. groups: its row groups that hold rows, in order."""
    numbers = sidecars.index.group[sidecars.index.shard_groups(shard)].tolist()
    shape = json.loads(sidecars.metadata["nev.shape"])
    total = Moments(0, np.zeros(shape[-1]), np.zeros(shape[-1]))

    def columns() -> Iterator[dict[str, Any]]:
        nonlocal total
        written = 0
        for number, group in zip(numbers, groups, strict=True):
            for _ in range(written, number):  # a row group without rows is not in the index
                yield {name: [] for name in SCHEMA.names}
            written = number + 1
            usable = np.array([not reason for reason in group.reason], bool)
            for part in np.array_split(group.features[usable], -(-len(group.features) // MOMENTS_ROWS)):
                total += Moments.of(part)  # float64 of a few pictures at a time: tokens are large
            values = [row.astype("<f2").tobytes() if usable[n] else b"" for n, row in enumerate(group.features)]
            yield {"uid": group.uid, "features": values, "reason": group.reason}

    write_groups(
        sidecars,
        shard,
        SCHEMA.with_metadata({"nev.views": str(views)}),
        columns(),
        lambda: {"nev.moments": total.to_text()},
    )


ONLINE = "run the trunk in the training loop with vision.mode=online, which is slower"


def check_image_sidecars(
    index: Index, features: Features, every_row: bool = False, otherwise: str = ONLINE
) -> list[dict[str, str]]:
    """Raise DataError for sidecars that are absent, of another trunk or view, or of fewer views. Returns the metadata of each.

    every_row: as `nev.data.sidecar.check_sidecars` has it.
    otherwise: what a user may do instead of writing them.
    """
    sidecars = features.sidecars(index)
    if missing := missing_sidecars(sidecars):
        raise DataError(
            f"{index.root}: {len(missing)} of {len(index.paths)} shards have no image sidecar of this trunk and view "
            f"(first: {index.paths[missing[0]]}){describe_others(sidecars)}. Write them with `nev embed-images --config CONFIG`, "
            f"or {otherwise}."
        )
    metadata = check_sidecars(sidecars, every_row)
    if (least := min(int(entry["nev.views"]) for entry in metadata)) < features.views:
        raise DataError(
            f"{index.root}: the image sidecars have {least} view(s) of a picture, and vision.views is {features.views}: write "
            f"them again with `nev embed-images --config CONFIG`, or set vision.views={least}."
        )
    return metadata


def describe_others(sidecars: Sidecars) -> str:
    """What image sidecars of other recipes are there, and in what these differ; empty where there are none."""
    folder = join(sidecars.index.root, FOLDER)
    fs, path = filesystem(folder)
    with read_errors_as_data_errors(folder, damaged=""):
        names = sorted(entry.rpartition("/")[2] for entry in fs.ls(path, detail=False)) if fs.exists(path) else []
    wanted = json.loads(sidecars.metadata["nev.recipe"])
    lines = []
    for name in names:
        location = join(folder, name, sidecars.index.paths[0])
        try:
            metadata = read_metadata(location, sidecars.remedy)[1]
            there = dict(json.loads(metadata.get("nev.recipe", "{}")))
        except (DataError, ValueError, TypeError):  # unfinished, damaged or a stranger's: nothing to compare with
            continue
        differing = [key for key in wanted if there.get(key) != wanted[key]]
        if differing:
            pairs = [f"{key} {_short(there.get(key))} there, {_short(wanted[key])} here" for key in differing]
            lines.append(f"{name} ({'; '.join(pairs)})")
    return f"; there are sidecars of others: {first_few(lines)}" if lines else ""


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else json.dumps(value)


def read_statistics(metadata: list[dict[str, str]]) -> NDArray[np.float32]:
    """The mean and the standard deviation of the features of all shards: float32 [2, F]. metadata: of the sidecars."""
    parts = [Moments.from_text(entry["nev.moments"]) for entry in metadata]
    total = parts[0]
    for part in parts[1:]:
        total += part
    return np.stack([total.mean, np.sqrt(total.squares / max(1, total.count))]).astype(np.float32)
