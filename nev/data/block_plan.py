"""What the stream and the workers know of a plan: which blocks a step and a rank take, and which rows a window of blocks has.

`Plan` is the plan of one set, `MixturePlan` that of several.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Segment(NamedTuple):
    """Rows [start, stop) of row group `group` (a position in the index), in epoch `epoch`."""

    group: int
    start: int
    stop: int
    epoch: int = 0


class Window(NamedTuple):
    """Consecutive blocks whose rows are read together.

    first: number of the first block.
    blocks: K, number of blocks.
    segments: the rows that are read, each once.
    order: int64 [K*R], the rows of the blocks, as positions in the rows of `segments`.
    """

    first: int
    blocks: int
    segments: list[Segment]
    order: NDArray[np.int64]


class BlockPlan(ABC):
    """The rows of every block. Blocks are numbered through the whole run. Parts are runs of whole windows, such as epochs.

    rows: int64 [G], number of rows of each row group; for several sets, those of one set after those of another.
    global_batch: B, rows of a step.
    block_rows: R, rows of a block; divides B.
    window: row groups whose rows are permuted together. 0: a window is a row group, whose rows keep their order.
    """

    rows: NDArray[np.int64]
    global_batch: int
    block_rows: int
    window: int

    def check_blocks(self) -> None:
        """Raise ValueError where a step is no whole number of blocks."""
        if self.global_batch % self.block_rows:
            raise ValueError(f"B ({self.global_batch}) must be a multiple of R ({self.block_rows})")

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """sha256, hex. Two plans with the same fingerprint have the same rows in every step."""

    @property
    @abstractmethod
    def total_rows(self) -> int:
        """Rows in all row groups."""

    @property
    @abstractmethod
    def tail_rows(self) -> int:
        """Rows that an epoch leaves out, other rows in each epoch."""

    @property
    @abstractmethod
    def groups_per_window(self) -> tuple[int, ...]:
        """The row groups of each set in a window of row groups of mean size."""

    @property
    @abstractmethod
    def blocks_per_window(self) -> int:
        """Blocks of a window of row groups of mean size, rounded up."""

    @abstractmethod
    def count_steps(self, epochs: int) -> int:
        """Whole steps of so many epochs."""

    @abstractmethod
    def epochs_done(self, step: int) -> tuple[float, ...]:
        """Epochs of each set after `step` steps."""

    @abstractmethod
    def find_part(self, block: int) -> int:
        """The part of a block number."""

    @abstractmethod
    def part_start(self, part: int) -> int:
        """The number of the first block of a part."""

    @abstractmethod
    def window_starts(self, part: int) -> NDArray[np.int64]:
        """The number of the first block of each window of a part: int64 [windows], ascending."""

    @abstractmethod
    def window_bounds(self, block: int) -> tuple[int, int]:
        """The first block of the window of a block, and the block behind its last one."""

    @abstractmethod
    def make_window(self, first: int, blocks: int = 1) -> Window:
        """The `blocks` blocks from `first` on, which lie in one window."""

    @property
    def blocks_per_step(self) -> int:
        """B / R."""
        return self.global_batch // self.block_rows

    def step_blocks(self, step: int) -> range:
        """Block numbers of a step."""
        return range(step * self.blocks_per_step, (step + 1) * self.blocks_per_step)

    def stream_blocks(self, step: int, stream: int, streams: int) -> range:
        """Block numbers of a step that stream number `stream` of `streams` hands out: each has an equal part of a step."""
        size = self.blocks_per_step // streams
        first = self.step_blocks(step).start + stream * size
        return range(first, first + size)

    def rank_blocks(self, step: int, rank: int, world: int, first_step: int = 0, streams: int = 1) -> list[int]:
        """Block numbers of a step that rank `rank` of `world` trains on.

        first_step: the step from which the streams began. From the first block of that step on, the ranks of a stream take turns.
            Where W divides the blocks of a step, `first_step` does not matter.
        streams: divides W and the blocks of a step. Each has W / streams consecutive ranks.
        """
        ranks = world // streams
        blocks = self.stream_blocks(step, rank // ranks, streams)
        before = (step - first_step) * len(blocks)
        return [block for at, block in enumerate(blocks, before) if at % ranks == rank % ranks]

    def max_rank_blocks(self, world: int) -> int:
        """The most blocks of a step that one of `world` ranks trains on."""
        return -(-self.blocks_per_step // world)


def check_window(first: int, blocks: int, bounds: tuple[int, int]) -> None:
    """Raise ValueError for blocks that are not in one window. bounds: of the window of the first block."""
    if not first < first + blocks <= bounds[1]:
        raise ValueError(
            f"blocks {first} to {first + blocks - 1} are not in one window, {bounds[0]} to {bounds[1] - 1}"
        )


def sequential_blocks(rows: NDArray[np.int64], block_rows: int) -> list[list[Segment]]:
    """The blocks of an evaluation: every row once, in index order, at most `block_rows` rows of one row group in a block."""
    return [
        [Segment(group, start, min(start + block_rows, int(count)))]
        for group, count in enumerate(rows)
        for start in range(0, int(count), block_rows)
    ]
