"""A reader of several sets: each segment is read by the reader of its set. No Ray in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nev.data.block import Block, BlockReader, EncodedRows
from nev.data.block_plan import Segment, Window
from nev.data.shard_files import ShardFiles, map_by_file


@dataclass(frozen=True)
class MixtureReader:
    """Reads rows of a mixture as arrays. `make_mixture_reader` makes it.

    readers: of each set, with the same settings.
    first_groups, first_shards: for each set, the number of row groups and shards in the sets before, int64 [sets].
    """

    readers: tuple[BlockReader, ...]
    first_groups: NDArray[np.int64]
    first_shards: NDArray[np.int64]

    @property
    def row_bytes(self) -> int:
        """Bytes of the arrays of a row, as `BlockReader` has them."""
        return self.readers[0].row_bytes

    def allocate(self, rows: int) -> NDArray[Any]:
        """Memory for the column `image` of a block of `rows` rows, not initialised."""
        return self.readers[0].allocate(rows)

    def read_blocks(self, window: Window, pictures: NDArray[Any] | None = None) -> Iterator[Block]:
        """The blocks of a window, as `BlockReader` has them, and `set`: int16 [R], the number of each row's set.

        shard: counted through all sets.
        """
        rows = self.load(window.segments)
        for chosen in window.order.reshape(window.blocks, -1):
            yield self.readers[0].decode(rows, chosen, pictures)

    def load(self, segments: list[Segment]) -> EncodedRows:
        """Read the rows of the segments, in order. Raises DataError."""
        parts = map_by_file(self._load_one, segments, [self._find_file(segment) for segment in segments])
        columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
        images = [image for part in parts for image in part.images]
        return EncodedRows(columns, np.concatenate([part.epochs for part in parts]), images)

    def _find_set(self, group: int) -> tuple[int, int]:
        """The set of a row group, and the row group's position in the index of that set."""
        number = int(np.searchsorted(self.first_groups, group, side="right")) - 1
        return number, group - int(self.first_groups[number])

    def _find_file(self, segment: Segment) -> str:
        number, group = self._find_set(segment.group)
        return self.readers[number].index.file_of(group)

    def _load_one(self, segment: Segment) -> EncodedRows:
        number, group = self._find_set(segment.group)
        rows = self.readers[number].load([segment._replace(group=group)])
        rows.columns["shard"] += np.int32(self.first_shards[number])
        rows.columns["set"] = np.full(len(rows.epochs), number, np.int16)
        return rows


Reader = BlockReader | MixtureReader


def make_mixture_reader(readers: Sequence[BlockReader]) -> MixtureReader:
    """The reader of a mixture of sets. readers: of each set, in the order of the plan."""
    groups = [len(reader.index.rows) for reader in readers]
    shards = [len(reader.index.paths) for reader in readers]
    files = ShardFiles()  # the limits of open files are those of a process
    sharing = tuple(replace(reader, _files=files) for reader in readers)
    return MixtureReader(sharing, *(np.cumsum([0, *counts[:-1]]) for counts in (groups, shards)))
