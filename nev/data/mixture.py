"""The plan of several sets in shares: a pure function (row groups, shares, seed, B, R, window, block number) -> which rows.

Each set is an endless sequence of row groups (`nev.data.set_order`). They are merged to one sequence (`nev.data.merged_order`),
in which the rows of each set stay within about a row group of its share at any place. Each `window` row groups of the merged
sequence are a window. Its rows are permuted, each set's rows spread evenly over the window, and divided into blocks of R rows. A
window that is no whole number of blocks takes the rows that its last block lacks from the beginning of the next one.

Windows are counted in parts: the row groups that begin in V rows of the merged sequence.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from nev.data.block_plan import BlockPlan, Segment, Window, check_window
from nev.data.merged_order import MergedOrder, merge_orders
from nev.data.permutation import permute_rows
from nev.data.plan import choose_window
from nev.data.set_order import WINDOW, Runs, SetOrder
from nev.storage.reading import DataError

PART_ROWS = 2**22  # at most


@dataclass(frozen=True)
class MixturePlan(BlockPlan):
    """The rows of every block of a mixture. `make_mixture` makes it.

    group_rows: for each set, the number of rows of each row group, int64 [G_i], in index order.
    shares: A_i, whole numbers without a common divisor: set i has A_i rows of each sum(A) rows.
    seed: of the permutations.
    global_batch, block_rows, window: as `BlockPlan` has them.
    epoch_rows: rows of an epoch of the run; None where the shares are weights, which know no epoch.
    part_rows: V.
    """

    group_rows: tuple[NDArray[np.int64], ...]
    shares: tuple[int, ...]
    seed: int
    global_batch: int
    block_rows: int
    window: int
    epoch_rows: int | None
    part_rows: int
    _parts: dict[int, Runs] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def rows(self) -> NDArray[np.int64]:  # type: ignore[override]
        """Number of rows of each row group, those of one set after those of another: int64 [G]."""
        return np.concatenate(self.group_rows)

    @functools.cached_property
    def first_groups(self) -> NDArray[np.int64]:
        """The number of row groups before each set: int64 [sets]."""
        return np.cumsum([0, *map(len, self.group_rows[:-1])])

    @functools.cached_property
    def orders(self) -> tuple[SetOrder, ...]:
        """The sequence of each set."""
        return make_orders(self.group_rows, self.seed, self.block_rows)

    @functools.cached_property
    def merged(self) -> SetOrder | MergedOrder:
        """The sequence of all sets."""
        return merge_orders(self.orders, self.shares)

    @property
    def fingerprint(self) -> str:
        """sha256, hex, of the row groups of all sets, their shares, and the length of an epoch."""
        numbers = (
            *self.shares,
            self.seed,
            self.global_batch,
            self.block_rows,
            self.window,
            self.part_rows,
            self.epoch_rows,
        )
        digest = hashlib.sha256(f"nev-mixture-1 {' '.join(map(str, numbers))} ".encode())
        for rows in self.group_rows:
            digest.update(f"{len(rows)} ".encode() + rows.astype("<i8").tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def total_rows(self) -> int:
        """Rows in all row groups of all sets."""
        return int(self.rows.sum())

    @property
    def tail_rows(self) -> int:
        """Rows that the sets leave out in an epoch of each, fewer than R a set."""
        return sum(order.skipped_rows for order in self.orders)

    @property
    def groups_per_window(self) -> tuple[int, ...]:
        """The row groups of each set in a window, if they are of mean size: whole ones, and parts at both ends."""
        rates = [share / float(rows.mean()) for rows, share in zip(self.group_rows, self.shares, strict=True)]
        groups = max(1, self.window) / sum(rates) + self.block_rows / sum(self.shares)  # the last block may need more
        return tuple(math.ceil(groups * rate) + 1 for rate in rates)

    @property
    def blocks_per_window(self) -> int:
        """Blocks of a window of row groups of mean size, rounded up."""
        return math.ceil(max(1, self.window) * mean_group_rows(self.group_rows, self.shares) / self.block_rows)

    def count_steps(self, epochs: int) -> int:
        """Whole steps of so many epochs of the run. Raises ValueError where the shares are weights."""
        if self.epoch_rows is None:
            raise ValueError("shares that are weights know no epoch")
        return epochs * self.epoch_rows // self.global_batch

    def epochs_done(self, step: int) -> tuple[float, ...]:
        """Epochs of each set after `step` steps, by its share."""
        rows = step * self.global_batch / sum(self.shares)
        return tuple(share * rows / order.epoch_rows for share, order in zip(self.shares, self.orders, strict=True))

    def find_part(self, block: int) -> int:
        """The part of a block number."""
        row = block * self.block_rows
        part = row // self.part_rows
        return part if self._first_row(part) <= row else part - 1

    def part_start(self, part: int) -> int:
        """The number of the first block that begins in a part."""
        return -(-self._first_row(part) // self.block_rows)

    def window_starts(self, part: int) -> NDArray[np.int64]:
        """The number of the first block of each window of a part: int64 [windows], ascending."""
        starts = -(-self._part(part).begin[:: max(1, self.window)] // self.block_rows)
        starts = starts[starts < self.part_start(part + 1)]
        return starts[np.diff(starts, prepend=-1) > 0]

    def window_bounds(self, block: int) -> tuple[int, int]:
        """The first block of the window of a block, and the block behind its last one. O(row groups of a part)."""
        part = self.find_part(block)
        starts = self.window_starts(part)
        number = int(np.searchsorted(starts, block, side="right"))
        return int(starts[number - 1]), int(starts[number]) if number < len(starts) else self.part_start(part + 1)

    def make_window(self, first: int, blocks: int = 1) -> Window:
        """The `blocks` blocks from `first` on, which lie in one window."""
        start, stop = self.window_bounds(first)
        check_window(first, blocks, (start, stop))
        rows = blocks * self.block_rows
        if not self.window:  # rows keep their order: no others are read
            return Window(first, blocks, self._segments(first, first + blocks)[0], np.arange(rows))
        segments, sets = self._segments(start, stop)
        place = (first - start) * self.block_rows
        return Window(first, blocks, segments, self._spread(sets, start)[place : place + rows])

    def _segments(self, start: int, stop: int) -> tuple[list[Segment], NDArray[np.int64]]:
        """The rows of blocks [start, stop), and the set of each row: int64 [(stop - start) * R]."""
        part, row, last = self.find_part(start), start * self.block_rows, stop * self.block_rows
        segments, sets = [], []
        while row < last:
            runs = self._part(part)
            for position in range(int(np.searchsorted(runs.begin, row, side="right")) - 1, len(runs.begin)):
                begin, number, group, first, rows, epoch = (int(column[position]) for column in runs)
                stop_row = min(last, begin + rows)
                segments.append(Segment(group, first + row - begin, first + stop_row - begin, epoch))
                sets.append(np.full(stop_row - row, number))
                row = stop_row
                if row == last:
                    break
            part += 1
        return segments, np.concatenate(sets)

    def _spread(self, sets: NDArray[np.int64], start: int) -> NDArray[np.int64]:
        """The permuted rows of a window, each set's rows at equal distances. sets: int64 [n], the set of each row."""
        permuted = permute_rows(len(sets), self.seed, WINDOW, start)
        place = np.empty(len(sets))
        for number in np.unique(sets):
            rows = permuted[sets[permuted] == number]
            place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
        return np.argsort(place, kind="stable")

    def _first_row(self, part: int) -> int:
        """The number of rows before the row groups of a part."""
        return int(self._part(part).begin[0])

    def _part(self, part: int) -> Runs:
        """The row groups that begin in a part."""
        if part not in self._parts:
            runs = self.merged.runs_between(part * self.part_rows, (part + 1) * self.part_rows)
            while len(self._parts) > 2:  # a stream moves forward, and a part asks where the next one begins
                self._parts.pop(next(iter(self._parts)))
            self._parts[part] = runs
        return self._parts[part]


def make_orders(sets: Sequence[NDArray[np.int64]], seed: int, block_rows: int) -> tuple[SetOrder, ...]:
    """The sequence of each set. sets: for each, the number of rows of each row group, int64 [G_i]."""
    firsts = np.cumsum([0, *map(len, sets)]).tolist()
    return tuple(SetOrder(rows, number, firsts[number], seed, block_rows) for number, rows in enumerate(sets))


def make_mixture(
    sets: Sequence[NDArray[np.int64]],
    weights: Sequence[float],
    by_epochs: bool,
    seed: int,
    global_batch: int,
    block_rows: int,
    window: int | None = None,
    names: Sequence[str] = (),
) -> MixturePlan:
    """The plan of a mixture.

    sets: for each set, the number of rows of each row group, int64 [G_i], in index order.
    weights: of each set: its share of the rows up to a factor, or with `by_epochs` its epochs in an epoch of the run.
    seed, global_batch, block_rows: as `MixturePlan` has them.
    window: None: as many row groups as have some 1,024 rows, and as there are sets at least.
    names: of the sets, for messages; none: their numbers.
    Raises DataError for a set without rows, or with fewer than a step takes of it.
    """
    orders = make_orders(sets, seed, block_rows)
    names = names or [f"set {number}" for number in range(1, len(sets) + 1)]
    if empty := [name for name, order in zip(names, orders, strict=True) if not order.epoch_rows]:
        raise DataError(f"{empty[0]} of data.train has no row that is used: leave it out, or raise data.used_rows.")
    factors = [Fraction(str(weight)) for weight in weights]
    if by_epochs:
        factors = [factor * order.epoch_rows for factor, order in zip(factors, orders, strict=True)]
    whole = math.lcm(*(factor.denominator for factor in factors))
    numbers = [int(factor * whole) for factor in factors]
    shares = tuple(number // math.gcd(*numbers) for number in numbers)
    for name, share, order in zip(names, shares, orders, strict=True):
        taken = share * global_batch / sum(shares)
        if taken > order.epoch_rows:
            raise DataError(
                f"{name} of data.train has {order.epoch_rows:,} rows in an epoch, and a step of {global_batch:,} takes "
                f"{taken:,.0f} of it by its share: pictures would meet themselves. Lower its weight or epochs, or "
                "train.global_batch."
            )
    group_rows = mean_group_rows(sets, shares)
    if window is None:
        rows = max(choose_window(counts, block_rows) * float(counts.mean()) for counts in sets)
        window = max(len(sets), int(rows / group_rows + 0.5))
    return MixturePlan(
        group_rows=tuple(sets),
        shares=shares,
        seed=seed,
        global_batch=global_batch,
        block_rows=block_rows,
        window=window,
        epoch_rows=int(sum(factors)) if by_epochs else None,
        part_rows=max(
            min(PART_ROWS, sum(order.epoch_rows for order in orders)),
            4 * (block_rows + max(order.largest_run for order in orders)),
        ),
    )


def mean_group_rows(sets: Sequence[NDArray[np.int64]], shares: Sequence[int]) -> float:
    """The mean number of rows of a row group of the merged sequence."""
    return sum(shares) / sum(share / float(rows.mean()) for rows, share in zip(sets, shares, strict=True))
