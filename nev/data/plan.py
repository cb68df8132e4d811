"""The plan: a pure function (row groups, seed, B, R, window, block number) -> which rows. No Ray, no files.

For each epoch the row groups are permuted by (seed, epoch). Their rows in that order make one sequence. Each `window` row groups
of the sequence are a window: its rows are permuted together, by (seed, epoch, window). The result is divided into blocks of
exactly R rows, and step k of the epoch is blocks [k*B/R, (k+1)*B/R). So the rows of any step follow without a replay of earlier
steps, and do not depend on the world size. Each row is used once an epoch, but for a tail shorter than B, which is counted.
Memory is O(row groups).

No block has rows of two windows. A window whose row groups are no whole number of blocks takes the rows that its last block
lacks, fewer than R, from the beginning of the next window. Where few row groups are uneven so, such as the last of each shard,
they come together, at a random place of the epoch, and the last window of them leaves its rest out, a part of the tail, at
random. All other windows are then whole row groups.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.data.block_plan import BlockPlan, Segment, Window, check_window
from nev.data.permutation import draw_bits, permute_groups, permute_rows
from nev.storage.reading import DataError

WINDOW_ROWS = 1024  # rows that meet each other in a window, by default
UNEVEN_BLOCKS = 6
FEW = 0.05  # share of row groups
SPREAD = 16  # windows, one of which leaves out rows


class Order(NamedTuple):
    """The row groups of an epoch, in order.

    groups: int32 [G], positions in the index.
    ends: int64 [G], number of rows up to the end of each.
    even_from: the row from which on all windows are a whole number of blocks; the number of all rows where there is none.
    """

    groups: NDArray[np.int32]
    ends: NDArray[np.int64]
    even_from: int


@dataclass(frozen=True)
class Plan(BlockPlan):
    """The rows of every block of every epoch. Parts are epochs, which consist of whole steps.

    rows, global_batch, block_rows, window: as `BlockPlan` has them.
    seed: of the permutations.
    """

    rows: NDArray[np.int64]
    seed: int
    global_batch: int
    block_rows: int
    window: int = 0
    _orders: dict[int, Order] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.check_blocks()
        if self.steps_per_epoch == 0:
            raise DataError(
                f"the data set has {self.total_rows} rows, fewer than one global batch of {self.global_batch}: "
                "lower train.global_batch (and data.block_rows with it), or add data."
            )

    @functools.cached_property
    def total_rows(self) -> int:
        """Rows in all row groups. Cached, because every block number is divided by the steps that follow from this sum."""
        return int(self.rows.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps of B rows in an epoch."""
        return self.total_rows // self.global_batch

    @property
    def blocks_per_epoch(self) -> int:
        """Blocks that an epoch uses."""
        return self.steps_per_epoch * self.blocks_per_step

    @property
    def groups_per_window(self) -> tuple[int, ...]:
        """The row groups of a window: one number."""
        return (max(1, self.window),)

    @property
    def blocks_per_window(self) -> int:
        """Blocks of a window of row groups of mean size, rounded up."""
        return -(-self.total_rows * max(1, self.window) // (len(self.rows) * self.block_rows))

    @property
    def tail_rows(self) -> int:
        """Rows that an epoch leaves out, fewer than B. Each epoch leaves out other row groups."""
        return self.total_rows - self.steps_per_epoch * self.global_batch

    @property
    def fingerprint(self) -> str:
        """sha256, hex. Two plans have the same fingerprint exactly if they have the same rows in every step."""
        head = f"nev-plan-1 {self.seed} {self.global_batch} {self.block_rows} "
        if self.window:
            window = min(self.window, len(self.rows))
            head = f"nev-plan-2 {window} {self.seed} {self.global_batch} {self.block_rows} "
        return hashlib.sha256(head.encode() + self.rows.astype("<i8").tobytes()).hexdigest()

    def count_steps(self, epochs: int) -> int:
        """Whole steps of so many epochs."""
        return epochs * self.steps_per_epoch

    def epochs_done(self, step: int) -> tuple[float, ...]:
        """Epochs that `step` steps are: one number."""
        return (step / self.steps_per_epoch,)

    def find_part(self, block: int) -> int:
        """The part of a block number: its epoch."""
        return block // self.blocks_per_epoch

    def part_start(self, part: int) -> int:
        """The number of the first block of an epoch."""
        return part * self.blocks_per_epoch

    def window_bounds(self, block: int) -> tuple[int, int]:
        """The first block of the window of a block, and the block behind its last one. O(log G) in a known epoch."""
        epoch, number = divmod(block, self.blocks_per_epoch)
        order = self._order(epoch)
        size = max(1, self.window)
        group = int(np.searchsorted(order.ends, self._first_row(number, order), side="right")) // size * size
        first_row = int(order.ends[group - 1]) if group else 0
        end_row = int(order.ends[min(group + size, len(order.ends)) - 1])
        start, stop = self._first_blocks(np.array([first_row, end_row]), order).tolist()
        base = epoch * self.blocks_per_epoch
        return base + start, base + min(stop, self.blocks_per_epoch)

    def window_starts(self, part: int) -> NDArray[np.int64]:
        """The number of the first block of each window of an epoch: int64 [windows], ascending."""
        order = self._order(part)
        size = max(1, self.window)
        starts = self._first_blocks(np.concatenate([np.zeros(1, np.int64), order.ends[size - 1 : -1 : size]]), order)
        starts = starts[starts < self.blocks_per_epoch]
        return starts[np.diff(starts, prepend=-1) > 0] + self.part_start(part)

    def make_window(self, first: int, blocks: int = 1) -> Window:
        """The `blocks` blocks from `first` on, which lie in one window. O(log G + rows of the window)."""
        start, stop = self.window_bounds(first)
        check_window(first, blocks, (start, stop))
        epoch = self.find_part(first)
        order, base = self._order(epoch), self.part_start(epoch)
        first_row = self._first_row(start - base, order)
        place, rows = (first - start) * self.block_rows, blocks * self.block_rows
        if not self.window:  # rows keep their order: no others are read
            return Window(first, blocks, self._segments(epoch, first_row + place, rows), np.arange(rows))
        count = self._first_row(stop - base, order) - first_row
        # The seed of an epoch's order, [seed, epoch], equals [seed, epoch, 0].
        positions = permute_rows(count, self.seed, epoch, start - base + 1)
        return Window(first, blocks, self._segments(epoch, first_row, count), positions[place : place + rows])

    def _first_row(self, number: int, order: Order) -> int:
        """The row of the epoch's sequence at which block `number` of the epoch begins, before rows are permuted."""
        whole, left_out = divmod(order.even_from, self.block_rows)
        return number * self.block_rows + (left_out if number >= whole else 0)

    def _first_blocks(self, rows: NDArray[np.int64], order: Order) -> NDArray[np.int64]:
        """The first block of the epoch that begins at each of these rows of the epoch's sequence, or behind."""
        whole, left_out = divmod(order.even_from, self.block_rows)
        uneven = np.minimum(-(-rows // self.block_rows), whole)
        return np.where(rows < order.even_from, uneven, (rows - left_out) // self.block_rows)

    def _segments(self, epoch: int, first: int, count: int) -> list[Segment]:
        """`count` rows of the epoch's sequence, from row `first` on."""
        order, ends, _ = self._order(epoch)
        last = first + count
        position = int(np.searchsorted(ends, first, side="right"))
        pieces: list[Segment] = []
        while first < last:
            group = int(order[position])
            group_end = int(ends[position])
            group_start = group_end - int(self.rows[group])
            stop = min(last, group_end)
            pieces.append(Segment(group, first - group_start, stop - group_start, epoch))
            first = stop
            position += 1
        return pieces

    def _order(self, epoch: int) -> Order:
        """The permuted row groups of an epoch."""
        if epoch not in self._orders:
            groups = permute_groups(len(self.rows), self.seed, epoch)
            even_from = self.total_rows
            if self.window:
                groups, even_groups = self._gather_uneven(groups, epoch)
                even_from -= int(self.rows[groups[even_groups:]].sum())
            while len(self._orders) > 1:  # a stream moves forward, so two epochs are enough at a boundary
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = Order(groups, np.cumsum(self.rows[groups]), even_from)
        return self._orders[epoch]

    def _gather_uneven(self, groups: NDArray[np.int32], epoch: int) -> tuple[NDArray[np.int32], int]:
        """Put the few uneven row groups of an epoch's order together. Returns the place behind their windows, too."""
        is_uneven = self.rows[groups] % self.block_rows != 0
        count = int(np.count_nonzero(is_uneven))
        if count > max(1, FEW * len(groups)):
            return groups, len(groups)
        uneven, even = groups[is_uneven], groups[~is_uneven]
        before = int(draw_bits(1, self.seed, epoch, 0, 1)[0] % (len(even) // self.window + 1)) * self.window
        # Some windows of even row groups belong to them, so that the rows that are left out are mostly of others.
        more = 1 + int(draw_bits(1, self.seed, epoch, 0, 2)[0] % SPREAD)
        behind = before + (count // self.window + more) * self.window if count else 0
        return np.concatenate([even[:before], uneven, even[before:]]), behind


def choose_window(rows: NDArray[np.int64], block_rows: int) -> int:
    """The default of `Plan.window`: as many row groups of mean size as have about `WINDOW_ROWS` rows together.

    rows: int64 [G], number of rows of each row group.
    block_rows: R. Where most row groups are no whole number of blocks, a window has `UNEVEN_BLOCKS` blocks at least, since it
        takes half a block from the next window, on average, which is read twice.
    """
    uneven = int(np.count_nonzero(rows % block_rows)) > len(rows) / 2
    wanted = max(WINDOW_ROWS, UNEVEN_BLOCKS * block_rows if uneven else 0)
    return max(1, int(wanted * len(rows) / max(1, int(rows.sum())) + 0.5))
