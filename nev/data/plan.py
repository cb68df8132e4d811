"""The plan: a pure function (row groups, seed, B, R, block number) -> which rows. No Ray, no files.

For each epoch the row groups are permuted by (seed, epoch). Their rows in that order make one sequence. The sequence is
divided into blocks of exactly R rows, and step k of the epoch is blocks [k*B/R, (k+1)*B/R). So the rows of any step follow
without a replay of earlier steps, and do not depend on the world size. Each row is used once an epoch, but for a tail shorter
than B, which is counted. Memory is O(row groups).
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
    """The rows of every block of every epoch. Blocks are numbered through all epochs, and epochs consist of whole steps.

    rows: int64 [G], number of rows of each row group, in index order.
    seed: of the permutation of row groups.
    global_batch: B, rows of a step.
    block_rows: R, rows of a block; divides B.
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
        """Rows in all row groups. Cached, because every block number is divided by the steps that follow from this sum."""
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
        """Rows that an epoch leaves out, fewer than B. Each epoch leaves out other row groups."""
        return self.total_rows - self.steps_per_epoch * self.global_batch

    @property
    def fingerprint(self) -> str:
        """sha256, hex. Two plans have the same fingerprint exactly if they have the same rows in every step."""
        head = f"nev-plan-1 {self.seed} {self.global_batch} {self.block_rows} ".encode()
        return hashlib.sha256(head + self.rows.astype("<i8").tobytes()).hexdigest()

    def epoch_of(self, block: int) -> int:
        """The epoch of a block number."""
        return block // self.blocks_per_epoch

    def segments(self, block: int) -> list[Segment]:
        """The rows of a block, in order: exactly R of them. O(log G) once the epoch's order is known."""
        epoch, number = divmod(block, self.blocks_per_epoch)
        order, ends = self._order(epoch)
        first = number * self.block_rows
        last = first + self.block_rows
        position = int(np.searchsorted(ends, first, side="right"))
        pieces: list[Segment] = []
        while first < last:
            group = int(order[position])
            group_end = int(ends[position])
            group_start = group_end - int(self.rows[group])
            stop = min(last, group_end)
            pieces.append(Segment(group, first - group_start, stop - group_start))
            first = stop
            position += 1
        return pieces

    def step_blocks(self, step: int) -> range:
        """Block numbers of a step."""
        return range(step * self.blocks_per_step, (step + 1) * self.blocks_per_step)

    def rank_blocks(self, step: int, rank: int, world: int, first_step: int = 0) -> list[int]:
        """Block numbers of a step that rank `rank` of `world` trains on.

        first_step: the step from which the stream began. From the first block of that step on, the ranks take turns. Where W
            divides the blocks of a step, `first_step` does not matter.
        """
        first = self.step_blocks(first_step).start
        return [block for block in self.step_blocks(step) if (block - first) % world == rank]

    def max_rank_blocks(self, world: int) -> int:
        """The most blocks of a step that one of `world` ranks trains on."""
        return -(-self.blocks_per_step // world)

    def _order(self, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The permuted row groups of an epoch and the cumulative row count after each."""
        if epoch not in self._orders:
            # NumPy promises that the raw bits of a BitGenerator stay the same over releases, but not Generator.permutation.
            keys = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(len(self.rows))
            # The low bits become the number of the row group: keys are then distinct, and a sort in place gives the
            # permutation in half the time of argsort.
            bits = np.uint64(len(self.rows).bit_length())
            keys = keys >> bits << bits | np.arange(len(self.rows), dtype=np.uint64)
            keys.sort()
            order = (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int32)
            while len(self._orders) > 1:  # a stream moves forward, so two epochs are enough at a boundary
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = (order, np.cumsum(self.rows[order]))
        return self._orders[epoch]


def sequential_blocks(rows: NDArray[np.int64], block_rows: int) -> list[list[Segment]]:
    """The blocks of an evaluation: every row once, in index order, at most `block_rows` rows of one row group in a block."""
    return [
        [Segment(group, start, min(start + block_rows, int(count)))]
        for group, count in enumerate(rows)
        for start in range(0, int(count), block_rows)
    ]
