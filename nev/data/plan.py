"""The plan: a pure function (row groups, seed, B, R, block number) -> which rows. No Ray, no files.

For each epoch the row groups are permuted by (seed, epoch); their rows in that order make one sequence; the sequence is
cut into blocks of exactly R rows; step k of the epoch is blocks [k*B/R, (k+1)*B/R). So any step can be named without
replaying the ones before it, every row is used once an epoch (but for a tail shorter than B, which is counted), and
the rows of a step do not depend on the world size. Memory is O(row groups).
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.storage.reading import DataError


class Segment(NamedTuple):
    """Rows [start, stop) of row group `group` (a position in the index)."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """Names the rows of every block of every epoch.

    rows: int64 [G], rows of each row group in index order; global_batch is B, block_rows is R, and R divides B.
    Blocks are numbered through all epochs; epochs hold whole steps.
    """

    rows: NDArray[np.int64]
    seed: int
    global_batch: int
    block_rows: int
    _orders: dict[int, tuple[NDArray[np.int32], NDArray[np.int64]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.global_batch % self.block_rows:
            raise ValueError(f"B ({self.global_batch}) must be a multiple of R ({self.block_rows})")
        if self.steps_per_epoch == 0:
            raise DataError(
                f"the data set has {self.total_rows} rows, fewer than one global batch of {self.global_batch}: "
                "lower train.global_batch (and data.block_rows with it), or add data."
            )

    @functools.cached_property
    def total_rows(self) -> int:
        """Rows in all row groups; summed once, since every block number is divided by it."""
        return int(self.rows.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps of B rows in an epoch."""
        return self.total_rows // self.global_batch

    @property
    def blocks_per_step(self) -> int:
        """B / R."""
        return self.global_batch // self.block_rows

    @property
    def blocks_per_epoch(self) -> int:
        """Blocks that an epoch uses."""
        return self.steps_per_epoch * self.blocks_per_step

    @property
    def tail_rows(self) -> int:
        """Rows that an epoch leaves out, fewer than B. They are in other row groups in each epoch."""
        return self.total_rows - self.steps_per_epoch * self.global_batch

    @property
    def fingerprint(self) -> str:
        """Equal for two plans exactly if they name the same rows for every step."""
        head = f"nev-plan-1 {self.seed} {self.global_batch} {self.block_rows} ".encode()
        return hashlib.sha256(head + self.rows.astype("<i8").tobytes()).hexdigest()

    def epoch_of(self, block: int) -> int:
        """The epoch that a block number lies in."""
        return block // self.blocks_per_epoch

    def segments(self, block: int) -> list[Segment]:
        """The rows of a block, in order: exactly R of them. O(log G) once the epoch's order is known."""
        epoch, position = divmod(block, self.blocks_per_epoch)
        order, ends = self._order(epoch)
        first = position * self.block_rows
        last = first + self.block_rows
        at = int(np.searchsorted(ends, first, side="right"))
        cut: list[Segment] = []
        while first < last:
            group = int(order[at])
            group_end = int(ends[at])
            group_start = group_end - int(self.rows[group])
            stop = min(last, group_end)
            cut.append(Segment(group, first - group_start, stop - group_start))
            first = stop
            at += 1
        return cut

    def step_blocks(self, step: int) -> range:
        """Block numbers of a step."""
        return range(step * self.blocks_per_step, (step + 1) * self.blocks_per_step)

    def rank_blocks(self, step: int, rank: int, world: int, since: int = 0) -> list[int]:
        """Block numbers of a step that rank `rank` of `world` trains on: the ranks take turns from the first one of step `since`.

        Where W divides the blocks of a step, all have equally many and `since` says nothing.
        """
        first = self.step_blocks(since).start
        return [block for block in self.step_blocks(step) if (block - first) % world == rank]

    def rank_room(self, world: int) -> int:
        """The most blocks of a step that one of `world` ranks trains on."""
        return -(-self.blocks_per_step // world)

    def _order(self, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The permuted row groups of an epoch and the cumulative row count after each."""
        if epoch not in self._orders:
            # The raw bits of a BitGenerator are stable over NumPy's releases; Generator.permutation is not promised to be.
            keys = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(len(self.rows))
            # The low bits become the row group's own number: keys are then distinct, and sorting them in place gives the
            # permutation, in half the time of argsort.
            bits = np.uint64(len(self.rows).bit_length())
            keys = keys >> bits << bits | np.arange(len(self.rows), dtype=np.uint64)
            keys.sort()
            order = (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int32)
            while len(self._orders) > 1:  # a stream moves forward: two epochs are enough to cross a boundary
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = (order, np.cumsum(self.rows[order]))
        return self._orders[epoch]


def in_order(rows: NDArray[np.int64], block_rows: int) -> list[list[Segment]]:
    """Every row once in index order, in blocks of at most `block_rows` that stay inside a row group: for evaluation."""
    return [
        [Segment(group, start, min(start + block_rows, int(count)))]
        for group, count in enumerate(rows)
        for start in range(0, int(count), block_rows)
    ]
