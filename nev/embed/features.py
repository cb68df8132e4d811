"""Writing image sidecars on Ray: a locked trunk runs once over every picture. Shards that have a sidecar are skipped.

Row groups are decoded and embedded in parallel, on GPUs or on CPUs (`nev.embed.images`). This process writes the sidecars, a row
group at a time, in the order of the shards.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ray.exceptions import RayError
from rich.console import Console

from nev.cluster.ray_internals import first_cause
from nev.common.errors import NevError
from nev.common.progress import progress
from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.data.block import Block, BlockReader
from nev.data.block_plan import Segment
from nev.data.image_sidecar import FeatureRows, Features, image_recipe, write_image_sidecar
from nev.data.index import Index, build_index
from nev.data.sidecar import sidecars_to_write
from nev.embed.gpus import choose_gpus, wait_for_gpu
from nev.embed.images import EmbedJob, EncoderSpec, embed_units
from nev.storage.files import filesystem, is_local

if TYPE_CHECKING:
    from nev.models.frozen import FrozenTrunk


class EmbeddingFailed(NevError, RuntimeError):
    """Pictures could not be embedded on the cluster. The message is the first cause, without Ray's frames."""


TOO_LARGE = "a feature is beyond float16, or not a number"


@dataclass(frozen=True)
class FeatureSet:
    """A set of shards whose pictures are embedded.

    reader: decodes the pictures; epoch v gives view v.
    features: what the sidecars hold.
    missing: numbers of the shards without a sidecar.
    """

    reader: BlockReader
    features: Features
    missing: list[int]

    @property
    def index(self) -> Index:
        """The row groups of the set."""
        return self.reader.index

    def count_rows(self) -> int:
        """Rows of the shards without a sidecar."""
        return sum(int(self.index.rows[self.index.shard_groups(shard)].sum()) for shard in self.missing)


class FeaturesWritten(NamedTuple):
    """The work of a call: sidecars, pictures and views in these, bad pictures by reason, seconds from first shard to last.

    trunk: fingerprint of the trunk.
    """

    trunk: str
    shards: int
    pictures: int
    views: int
    bad: Counter[str]
    seconds: float


def embed_features(config: Experiment, console: Console, gpus: int | None = None) -> FeaturesWritten:
    """Write the image sidecars that are missing for `data.train` and `data.val`, or no longer fit. Needs a connected Ray.

    config: with absolute paths.
    gpus: number of GPUs to use; an autoscaler may have to start them. None: the GPUs that are up now; without any, CPUs.
    Raises ConfigError for an experiment without a locked trunk, for a full disk, and for more GPUs than a Ray that cannot grow
    has; DataError for shards that cannot be used.
    """
    from nev.models.frozen import load_frozen_trunk

    config.refuse_trained_trunk()
    chosen = choose_gpus(gpus)
    trunk = load_frozen_trunk(config.vision, config.data.image_size)
    warn_of_other_pixels(trunk, config, console)
    sets = list_feature_sets(config, trunk.fingerprint, trunk.shape)
    check_room(sets, console)
    try:
        return write_feature_sets(sets, make_spec(config, trunk), trunk.fingerprint, config.eval.batch, chosen, console)
    except RayError as error:  # a process of the cluster has died, or could not load the trunk
        cause = getattr(error, "cause", None) or error
        raise EmbeddingFailed(first_cause(cause).splitlines()[0]) from error


def list_feature_sets(config: Experiment, trunk: str, shape: tuple[int, ...]) -> list[FeatureSet]:
    """The training sets with their views, and the validation set with the evaluation view. trunk: its fingerprint."""
    data, sets = config.data, []
    for number, data_set in enumerate(data.sets):
        training, index = number < len(data.train_sets), build_index(*data_set)
        augment = data.augment if training else None
        recipe = image_recipe(trunk, index.columns.image, data, config.seed, training)
        features = Features(recipe, shape, config.vision.views if training else 1)
        reader = BlockReader(index, data.image_size, data.limits, config.seed, augment)
        sets.append(FeatureSet(reader, features, list_missing(index, features)))
    return sets


def list_missing(index: Index, features: Features) -> list[int]:
    """Numbers of the shards whose sidecar is absent, does not fit, or has too few views."""
    return sidecars_to_write(features.sidecars(index), lambda metadata: int(metadata["nev.views"]) >= features.views)


def make_spec(config: Experiment, trunk: FrozenTrunk) -> EncoderSpec:
    """The trunk as Ray's tasks load it."""
    from nev.models.frozen import load_same_trunk

    load = functools.partial(load_same_trunk, config.vision, config.data.image_size, trunk.fingerprint)
    return EncoderSpec(load, config.data.mean, config.data.std)


def warn_of_other_pixels(trunk: FrozenTrunk, config: Experiment, console: Console) -> None:
    """Print a warning where the trunk was trained with another mean or deviation of pixels than `data` has."""
    published = getattr(trunk.trunk, "pretrained_cfg", None) or {}
    for name in ("mean", "std"):
        own, here = published.get(name), getattr(config.data, name)
        if own and not np.allclose(own, here, atol=1e-3):
            console.print(
                f"[yellow]data.{name} is {list(here)}, and {config.vision.trunk} was trained with {list(own)}[/]",
                highlight=False,
                soft_wrap=True,
            )


def check_room(sets: list[FeatureSet], console: Console) -> None:
    """Print how many bytes the sidecars of each set will take. Raises ConfigError where a local disk has no room for them."""
    needed_on = Counter[int]()
    for each in sets:
        rows, root = each.count_rows(), each.index.root
        if not rows:
            continue
        needed = 2 * rows * each.features.views * each.features.numbers
        shape = " x ".join(map(str, (each.features.views, *each.features.shape)))
        line = f"{root}: {rows:,} pictures of {shape} numbers, {format_bytes(needed)}"
        console.print(line, highlight=False, soft_wrap=True)
        fs, path = filesystem(root)
        if not is_local(fs):
            continue
        disk = Path(path).stat().st_dev
        needed_on[disk] += needed
        if needed_on[disk] > (free := shutil.disk_usage(path).free):
            raise ConfigError(
                f"{root}: the image sidecars take {format_bytes(needed_on[disk])}, and the disk has {format_bytes(free)} free. "
                "Make room, lower vision.views, or set vision.keep=pooled, which keeps one vector a picture."
            )


def format_bytes(count: int) -> str:
    """A number of bytes with a unit, for the console."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 2**10:,.1f} KiB"


def write_feature_sets(
    sets: list[FeatureSet], tower: EncoderSpec, trunk: str, batch: int, gpus: int, console: Console
) -> FeaturesWritten:
    """Embed the pictures of all shards without a sidecar, and write the sidecars.

    trunk: fingerprint of the trunk. batch: pictures embedded at a time.
    """
    work = [(each, shard) for each in sets for shard in each.missing]
    total = sum(each.count_rows() * each.features.views for each in sets)
    bad, done, begin = Counter[str](), 0, time.perf_counter()
    first: tuple[float, int] | None = None
    if not work:
        return FeaturesWritten(trunk, 0, 0, 0, bad, 0.0)
    jobs = [EmbedJob(row_groups(each.index, shard), make_read(each, batch)) for each, shard in work]
    wait_for_gpu(min(gpus, sum(len(job.units) for job in jobs)), console)
    with progress(console) as update:

        def show(more: int) -> None:
            nonlocal done, first
            done += more
            if first is None and more:  # the pace is that without the start of the processes
                first = time.perf_counter(), done
            seconds, pictures = (time.perf_counter() - first[0], done - first[1]) if first else (0.0, 0)
            update(
                "pictures embedded", done, total, f"{pictures / seconds:,.0f} pictures/s" if pictures else "starting"
            )

        show(0)
        units = embed_units(jobs, tower, batch * sets[0].reader.row_bytes, show, gpus)
        for number, rows_of_shard in itertools.groupby(units, key=lambda unit: unit[0]):
            each, shard = work[number]
            groups = (collect_views(rows, each.features, bad) for _, rows in rows_of_shard)
            write_image_sidecar(each.features.sidecars(each.index), shard, each.features.views, groups)
    for (each, shard), job in zip(work, jobs, strict=True):
        if not job.units:  # a shard without rows
            write_image_sidecar(each.features.sidecars(each.index), shard, each.features.views, iter(()))
    pictures = sum(each.count_rows() for each in sets)
    return FeaturesWritten(trunk, len(work), pictures, total, bad, time.perf_counter() - begin)


def row_groups(index: Index, shard: int) -> list[Segment]:
    """The row groups of a shard, whole."""
    groups = range(len(index.rows))[index.shard_groups(shard)]
    return [Segment(group, 0, int(index.rows[group])) for group in groups]


def make_read(each: FeatureSet, batch: int) -> Callable[[Segment], Iterator[Block]]:
    """The function that Ray's tasks decode a row group by."""
    return functools.partial(read_views, reader=each.reader, views=each.features.views, batch=batch)


def read_views(segment: Segment, reader: BlockReader, views: int, batch: int) -> Iterator[Block]:
    """The decoded pictures of a row group: blocks of at most `batch` rows, each view of them in turn."""
    rows = reader.load([segment])
    for start in range(0, len(rows.images), batch):
        for view in range(views):
            of_view = rows._replace(epochs=np.full_like(rows.epochs, view))
            block = reader.decode(of_view, slice(start, start + batch))
            yield {name: block[name] for name in ("image", "uid", "reason", "row")}


def collect_views(rows: Block | NevError, features: Features, bad: Counter[str]) -> FeatureRows:
    """Put the views of each picture of a row group side by side. bad: counts the pictures that cannot be used, by reason.

    A picture of which one view cannot be used has no features. Raises the error of a row group that could not be read.
    """
    if isinstance(rows, NevError):
        raise rows
    order = np.argsort(rows["row"], kind="stable")  # blocks come in the order of their views
    by_row = {name: rows[name][order].reshape(-1, features.views) for name in ("uid", "reason")}
    vectors = rows["vector"][order].reshape(-1, features.views, *features.shape)
    reasons = []
    for of_views, features_of_row in zip(by_row["reason"], vectors, strict=True):
        beyond = "" if np.isfinite(features_of_row).all() else TOO_LARGE
        reasons.append(str(next(filter(None, of_views), beyond)))
    bad.update(filter(None, reasons))
    uids = [str(uid) for uid in by_row["uid"][:, 0]]
    return FeatureRows(uids, vectors, reasons)
