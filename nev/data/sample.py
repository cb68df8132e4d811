"""A sample of a set: rows drawn by a seed, and a reader of these rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nev.config.data import Data
from nev.data.block import Block, BlockReader
from nev.data.block_plan import Segment, sequential_blocks
from nev.data.index import Index
from nev.data.rows import parse_captions
from nev.data.sidecar import decode_vectors, read_uid_column
from nev.data.text_sidecar import check_sidecars, text_sidecars

MAX_GROUPS = 256  # row groups of a sample: each is read whole for the rows that are drawn from it


def draw_rows(rows: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Draw rows of a set: int64 [n, 2], row group and row in the row group, in the order of the draw. A pure function.

    rows: int64 [G], rows of each row group.
    count: n; all rows where the set has fewer.

    Every row is equally likely where the set has at most `MAX_GROUPS` row groups. From a larger set so many row groups are drawn
    first (more where these hold fewer than n rows), so that a sample of a billion rows does not read a billion pictures.
    """
    order = _shuffle(len(rows), seed, 0)
    groups_with_enough = int(np.searchsorted(np.cumsum(rows[order]), count)) + 1
    order = order[: max(MAX_GROUPS, groups_with_enough)]
    counts = rows[order]
    chosen = _shuffle(int(counts.sum()), seed, 1)[:count]
    ends = np.cumsum(counts)
    place = np.searchsorted(ends, chosen, side="right")
    return np.stack([order[place], chosen - (ends - counts)[place]], axis=1)


def _shuffle(count: int, *seed: int) -> NDArray[np.int64]:
    """A permutation of 0 to count - 1: int64 [count]."""
    # NumPy promises that the raw bits of a BitGenerator stay the same over releases, but not Generator.permutation.
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count), kind="stable")


@dataclass(frozen=True)
class SampleReader(BlockReader):
    """Reads drawn rows. A segment counts the drawn rows of a row group. `make_sample_reader` makes one.

    index: the shards that have a drawn row.
    drawn: the drawn rows of each row group of `index`, in ascending order, int64 [n_g].
    """

    drawn: tuple[NDArray[np.int64], ...] = ()

    @property
    def total(self) -> int:
        """Number of drawn rows."""
        return sum(map(len, self.drawn))

    def blocks(self, batch: int) -> list[list[Segment]]:
        """The drawn rows in the order of the index, at most `batch` rows of one row group in a block."""
        return sequential_blocks(np.array([len(part) for part in self.drawn]), batch)

    def read_rows(self, location: str, group: int, columns: list[str], segment: Segment) -> pa.Table:
        """Columns of the drawn rows that `segment` counts. Raises DataError."""
        whole = Segment(segment.group, 0, int(self.index.rows[segment.group]))
        table = super().read_rows(location, group, columns, whole)
        return table.take(pa.array(self.drawn[segment.group][segment.start : segment.stop]))


def make_sample_reader(index: Index, rows: NDArray[np.int64], data: Data) -> SampleReader:
    """The reader of rows that `draw_rows` has drawn: the evaluation view, without texts, of the shards with such a row."""
    shards = np.unique(index.shard[rows[:, 0]])
    groups = np.flatnonzero(np.isin(index.shard, shards))
    narrow = replace(
        index,
        paths=tuple(index.paths[shard] for shard in shards.tolist()),
        shard=np.searchsorted(shards, index.shard[groups]).astype(np.int32),
        group=index.group[groups],
        rows=index.rows[groups],
        nbytes=index.nbytes[groups],
        tars=tuple(index.tars[shard] for shard in shards.tolist()),
    )
    drawn = tuple(np.sort(rows[rows[:, 0] == group, 1]) for group in groups)
    return SampleReader(narrow, data.image_size, data.limits, seed=0, augment=None, drawn=drawn)


def read_pictures(segments: list[Segment], reader: SampleReader) -> Iterator[Block]:
    """The decoded pictures of a block of a sample, as `nev.embed.images.EmbedJob` takes these: image, valid, reason."""
    block = reader.read(segments)
    yield {name: block[name] for name in ("image", "valid", "reason")}


def picture_reader(reader: SampleReader, image_size: int) -> Callable[[list[Segment]], Iterator[Block]]:
    """`read_pictures` of a sample at a size of its own, for processes of Ray."""
    return partial(read_pictures, reader=replace(reader, image_size=image_size))


def read_captions(reader: SampleReader) -> list[list[str]]:
    """The captions of each row of a sample."""
    column = str(reader.index.columns.caption)
    groups = _read_groups(reader, reader.index.location, [column])
    return [parse_captions(value) for table in groups for value in table[column].to_pylist()]


def read_caption_vectors(reader: SampleReader, key: str, width: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The captions' vectors of a sample from its text sidecars: float32 [m, D], rows of unit length; int64 [m], their rows.

    Raises DataError for sidecars that are absent, of another encoder, or of other rows.
    """
    check_sidecars(reader.index, key, width)
    sidecars, uid = text_sidecars(reader.index, key, width), str(reader.index.columns.uid)
    shards = _read_groups(reader, reader.index.location, [uid])
    vectors, counts = [np.zeros((0, width), np.float32)], [np.zeros(0, np.int64)]
    for group, table in enumerate(_read_groups(reader, sidecars.location, ["uid", "vectors"])):
        if read_uid_column(table["uid"]) != read_uid_column(next(shards)[uid]):
            raise sidecars.misaligned(int(reader.index.shard[group]))
        part, starts = decode_vectors(table["vectors"], width)
        vectors.append(part.astype(np.float32))
        counts.append(np.diff(starts))
    stacked, owner = np.concatenate(vectors), np.repeat(np.arange(reader.total), np.concatenate(counts))
    return stacked / np.linalg.norm(stacked, axis=1, keepdims=True), owner


def _read_groups(reader: SampleReader, locate: Callable[[int], str], columns: list[str]) -> Iterator[Any]:
    """The drawn rows of each row group, from the files that `locate` names by the number of a shard."""
    for group, drawn in enumerate(reader.drawn):
        place = locate(int(reader.index.shard[group])), int(reader.index.group[group])
        yield reader.read_rows(*place, columns, Segment(group, 0, len(drawn)))
