"""The windows of a range of blocks: the tasks of a stream."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nev.data.plan import Plan, Window
from nev.data.shard_files import reads_head


@dataclass(frozen=True)
class Windows:
    """The windows that have blocks in [first, last), in order. `make_windows` makes them.

    first, last: block numbers. The first window may begin before `first`, and the last end behind `last`: those blocks are not
        in it.
    ends: int64 [E], number of windows up to the end of each epoch of the range.
    """

    plan: Plan
    first: int
    last: int
    ends: NDArray[np.int64]
    _starts: dict[int, NDArray[np.int64]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, number: int) -> Window:
        """Window `number` of the range. O(log G + rows of the window) in an epoch whose order is known."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        position = int(np.searchsorted(self.ends, number, side="right"))
        before = int(self.ends[position - 1]) if position else 0
        epoch = self.plan.epoch_of(self.first) + position
        if epoch not in self._starts:
            self._starts.clear()
            self._starts[epoch] = _starts_between(self.plan, epoch, self.first, self.last)
        start = int(self._starts[epoch][number - before])
        return self.plan.make_window(start, min(self.plan.window_bounds(start)[1], self.last) - start)


def make_windows(plan: Plan, first: int, last: int) -> Windows:
    """The windows of blocks [first, last). O(G log G) for each epoch of the range."""
    epochs = range(plan.epoch_of(first), plan.epoch_of(last - 1) + 1) if first < last else range(0)
    counts = [len(_starts_between(plan, epoch, first, last)) for epoch in epochs]
    return Windows(plan, first, last, np.cumsum(np.array(counts, np.int64)))


def count_rows_read(plan: Plan, count: int = 500) -> float:
    """Rows that are read for a block: the mean over `count` windows in the middle of an epoch."""
    windows = make_windows(plan, 0, plan.blocks_per_epoch)
    middle = range(len(windows))[max(0, len(windows) - count) // 2 :][:count]
    blocks = rows = 0
    for number in middle:
        window = windows[number]
        blocks += window.blocks
        for group, start, stop, _ in window.segments:
            size = int(plan.rows[group])
            rows += stop if start == 0 and reads_head(stop, size) else size
    return rows / blocks


def _starts_between(plan: Plan, epoch: int, first: int, last: int) -> NDArray[np.int64]:
    """The first block of each window of an epoch in [first, last), as block numbers; `first` for the window around it."""
    base = epoch * plan.blocks_per_epoch
    starts = plan.window_starts(epoch) + base
    begin = int(np.searchsorted(starts, first, side="right")) - 1 if first > base else 0
    return np.maximum(starts[begin : int(np.searchsorted(starts, last))], first)
