"""The endless sequence of one set's rows in a mixture: epoch after epoch, each with its own order of the row groups.

A block is a whole number of row groups or a whole part of one, in most sets. Where few row groups of a set are not, such as the
last of each shard, they come together, at a random place of the epoch, and a row group behind them leaves out a run of rows at
random, fewer than R: what follows is in whole blocks again, and no row group is read twice.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.data.permutation import draw_bits, permute_groups
from nev.data.plan import FEW

# What random numbers are for: the second number of their seed.
GROUPS, PLACE, LEFT_OUT, WINDOW = 1, 2, 3, 4


class EpochOrder(NamedTuple):
    """The runs of rows of an epoch, in order: row groups, of which one may be two runs.

    groups: int32 [n], row group of each run, as a position in the set's index.
    rows: int64 [n], number of rows of each run.
    ends: int64 [n], number of rows up to the end of each run.
    first_rows: run -> its first row in its row group, where that is not 0.
    """

    groups: NDArray[np.int32]
    rows: NDArray[np.int64]
    ends: NDArray[np.int64]
    first_rows: dict[int, int]

    def first_run(self, position: int) -> int:
        """The first run that begins at `position` of the epoch, or behind; n where there is none."""
        return int(np.searchsorted(self.ends, position)) + 1 if position > 0 else 0


class Runs(NamedTuple):
    """Runs of rows, n of them. Each is int64 [n].

    begin: number of rows of the sequence before each run.
    set: number of the set.
    group: row group, as the mixture counts them.
    start: first row in the row group.
    rows: number of rows.
    epoch: of the set.
    """

    begin: NDArray[np.int64]
    set: NDArray[np.int64]
    group: NDArray[np.int64]
    start: NDArray[np.int64]
    rows: NDArray[np.int64]
    epoch: NDArray[np.int64]


@dataclass(frozen=True)
class SetOrder:
    """The sequence of set number `number` of a mixture.

    rows: int64 [G], number of rows of each row group, in index order.
    first_group: number of row groups in the sets before.
    seed: of the permutations.
    block_rows: R.
    """

    rows: NDArray[np.int64]
    number: int
    first_group: int
    seed: int
    block_rows: int
    _epochs: dict[int, EpochOrder] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def largest_run(self) -> int:
        """The most rows of a run."""
        return int(self.rows.max())

    @functools.cached_property
    def skipped_rows(self) -> int:
        """Rows that an epoch leaves out, fewer than R. 0 where many row groups are no whole number of blocks."""
        filled = self.rows[self.rows > 0]
        uneven = filled % self.block_rows
        count = int(np.count_nonzero(uneven))
        return int(uneven.sum() % self.block_rows) if count <= max(1, FEW * len(filled)) and count < len(filled) else 0

    @functools.cached_property
    def epoch_rows(self) -> int:
        """Rows of an epoch."""
        return int(self.rows.sum()) - self.skipped_rows

    def runs_between(self, first: int, last: int) -> Runs:
        """The runs that begin at `first` of the sequence or behind, and before `last`."""
        parts, first_epoch = [], first // self.epoch_rows
        for epoch in range(first_epoch, max(first_epoch + 1, -(-last // self.epoch_rows))):
            order, base = self._order(epoch), epoch * self.epoch_rows
            chosen = slice(order.first_run(first - base), order.first_run(last - base))
            group, rows = order.groups[chosen].astype(np.int64) + self.first_group, order.rows[chosen]
            start = np.zeros(len(group), np.int64)
            for run, row in order.first_rows.items():
                if chosen.start <= run < chosen.stop:
                    start[run - chosen.start] = row
            number, epochs = (np.full(len(group), value) for value in (self.number, epoch))
            parts.append((order.ends[chosen] - rows + base, number, group, start, rows, epochs))
        return Runs(*map(np.concatenate, zip(*parts, strict=True)))

    def _order(self, epoch: int) -> EpochOrder:
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # the sequence is read forward, so two epochs are enough at a boundary
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = self._make_order(epoch)
        return self._epochs[epoch]

    def _make_order(self, epoch: int) -> EpochOrder:
        groups = permute_groups(len(self.rows), self.seed, GROUPS, self.number, epoch)
        groups = groups[self.rows[groups] > 0]  # `data.used_rows` may leave none of a row group
        skipped_rows = self.skipped_rows
        if not skipped_rows:
            rows = self.rows[groups]
            return EpochOrder(groups, rows, np.cumsum(rows), {})
        is_uneven = self.rows[groups] % self.block_rows != 0
        uneven, even = groups[is_uneven], groups[~is_uneven]
        place = self._draw(PLACE, epoch, len(even))
        cut = even[place]
        size = int(self.rows[cut])
        # The row behind those that are left out. Behind the row group's last row comes its first one.
        begin = self._draw(LEFT_OUT, epoch, size)
        sizes = [min(size - begin, size - skipped_rows), max(0, begin - skipped_rows)]
        runs = np.concatenate([even[:place], uneven, [cut] * (1 + (sizes[1] > 0)), even[place + 1 :]]).astype(np.int32)
        rows, position = self.rows[runs], place + len(uneven)
        rows[position] = sizes[0]
        if sizes[1]:
            rows[position + 1] = sizes[1]
        return EpochOrder(runs, rows, np.cumsum(rows), {position: begin} if begin else {})

    def _draw(self, purpose: int, epoch: int, below: int) -> int:
        return int(draw_bits(1, self.seed, purpose, self.number, epoch)[0] % np.uint64(below))
