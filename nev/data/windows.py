"""The windows of a range of blocks: the tasks of a stream."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nev.data.block_plan import BlockPlan, Window
from nev.data.shard_files import reads_head


@dataclass(frozen=True)
class Windows:
    """The windows that have blocks in [first, last), in order. `make_windows` makes them.

    first, last: block numbers. The first window may begin before `first`, and the last end behind `last`: those blocks are not
        in it.
    stream, streams: number of the stream, and of all. With several, a window is cut where the part of a stream ends, and each
        piece reads the window whole.
    ends: int64 [P], number of windows up to the end of each part of the range.
    """

    plan: BlockPlan
    first: int
    last: int
    stream: int
    streams: int
    ends: NDArray[np.int64]
    _starts: dict[int, NDArray[np.int64]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, number: int) -> Window:
        """Window `number` of the range. O(log G + rows of the window) in a part whose order is known."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        position = int(np.searchsorted(self.ends, number, side="right"))
        before = int(self.ends[position - 1]) if position else 0
        part = self.plan.find_part(self.first) + position
        if part not in self._starts:
            self._starts.clear()
            self._starts[part] = _starts_between(self.plan, part, self.first, self.last, self.stream, self.streams)
        start = int(self._starts[part][number - before])
        end = min(self.plan.window_bounds(start)[1], self.last)
        if self.streams > 1:
            size = self.plan.blocks_per_step // self.streams
            end = min(end, (start // size + 1) * size)
        return self.plan.make_window(start, end - start)


def make_windows(plan: BlockPlan, first: int, last: int, stream: int = 0, streams: int = 1) -> Windows:
    """The windows of blocks [first, last) of a stream. O(G log G) for each epoch of the range.

    stream, streams: as `Windows` has them.
    """
    parts = range(plan.find_part(first), plan.find_part(last - 1) + 1) if first < last else range(0)
    counts = [len(_starts_between(plan, part, first, last, stream, streams)) for part in parts]
    return Windows(plan, first, last, stream, streams, np.cumsum(np.array(counts, np.int64)))


def task_blocks(plan: BlockPlan, streams: int) -> int:
    """Blocks of a task: of a window of mean size, or of a stream's part of a step where that is less."""
    return min(plan.blocks_per_window, plan.blocks_per_step // streams) if streams > 1 else plan.blocks_per_window


def count_rows_read(plan: BlockPlan, streams: int = 1, count: int = 500) -> float:
    """Rows that are read for a block: the mean over `count` windows in the middle of the first part, of the first stream."""
    windows = make_windows(plan, 0, plan.part_start(1), 0, streams)
    middle = range(len(windows))[max(0, len(windows) - count) // 2 :][:count]
    blocks = rows = 0
    for number in middle:
        window = windows[number]
        blocks += window.blocks
        for group, start, stop, _ in window.segments:
            size = int(plan.rows[group])
            rows += stop if start == 0 and reads_head(stop, size) else size
    return rows / blocks


def _starts_between(plan: BlockPlan, part: int, first: int, last: int, stream: int, streams: int) -> NDArray[np.int64]:
    """The first block of each window of a part in [first, last) for a stream; `first` for the window around it."""
    starts = plan.window_starts(part)
    begin = int(np.searchsorted(starts, first, side="right")) - 1 if first > starts[0] else 0
    starts = np.maximum(starts[begin : int(np.searchsorted(starts, last))], first)
    if streams == 1:
        return starts
    size = plan.blocks_per_step // streams
    end = min(last, plan.part_start(part + 1))
    cuts = np.arange(-(-int(starts[0]) // size), -(-end // size)) * size
    starts = np.union1d(starts, cuts)
    of_stream: NDArray[np.int64] = starts[starts // size % streams == stream]
    return of_stream
