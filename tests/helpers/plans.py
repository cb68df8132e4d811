"""Plans that hypothesis makes up, and the rows of a plan's blocks."""

from collections.abc import Iterator

import numpy as np
from hypothesis import strategies as st

from nev.data.block_plan import Segment, Window
from nev.data.plan import Plan


@st.composite
def plans(draw: st.DrawFn, windows: st.SearchStrategy[int] | None = None) -> Plan:
    block_rows = draw(st.integers(1, 9))
    global_batch = block_rows * draw(st.sampled_from([1, 2, 4, 8, 12]))
    rows = draw(st.lists(st.integers(1, 20), min_size=1, max_size=40))
    if sum(rows) < global_batch:
        rows.append(global_batch)
    window = draw(windows if windows is not None else st.integers(0, 6))
    return Plan(np.array(rows, np.int64), draw(st.integers(0, 2**63)), global_batch, block_rows, window)


def fresh(plan: Plan) -> Plan:
    """The same plan, which knows no epoch's order yet."""
    return Plan(plan.rows, plan.seed, plan.global_batch, plan.block_rows, plan.window)


def segment_rows(segments: list[Segment]) -> list[tuple[int, int, int]]:
    """(epoch, row group, row) of each row."""
    return [(epoch, group, row) for group, start, stop, epoch in segments for row in range(start, stop)]


def window_blocks(window: Window) -> Iterator[list[tuple[int, int, int]]]:
    """The rows of each block of a window."""
    rows = segment_rows(window.segments)
    for block in window.order.reshape(window.blocks, -1).tolist():
        yield [rows[position] for position in block]


def block_rows(plan: Plan, block: int) -> list[tuple[int, int, int]]:
    """The rows of a block: epoch, row group, row in the row group."""
    return next(window_blocks(plan.make_window(block)))


def epoch_blocks(plan: Plan, epoch: int) -> range:
    return range(epoch * plan.blocks_per_epoch, (epoch + 1) * plan.blocks_per_epoch)


def epoch_rows(plan: Plan, epoch: int) -> list[tuple[int, int, int]]:
    """The rows of an epoch, in order."""
    return [row for block in epoch_blocks(plan, epoch) for row in block_rows(plan, block)]
