"""Plans that hypothesis makes up, and the rows of a plan's blocks."""

from collections.abc import Iterator

import numpy as np
from hypothesis import reject
from hypothesis import strategies as st

from nev.data.block_plan import BlockPlan, Segment, Window
from nev.data.mixture import MixturePlan, make_mixture
from nev.data.plan import Plan
from nev.storage.reading import DataError


@st.composite
def plans(draw: st.DrawFn, windows: st.SearchStrategy[int] | None = None) -> Plan:
    block_rows = draw(st.integers(1, 9))
    global_batch = block_rows * draw(st.sampled_from([1, 2, 4, 8, 12]))
    rows = draw(st.lists(st.integers(1, 20), min_size=1, max_size=40))
    if sum(rows) < global_batch:
        rows.append(global_batch)
    window = draw(windows if windows is not None else st.integers(0, 6))
    return Plan(np.array(rows, np.int64), draw(st.integers(0, 2**63)), global_batch, block_rows, window)


@st.composite
def mixtures(draw: st.DrawFn) -> MixturePlan:
    """Mixtures of one to four small sets, whose row groups are whole blocks or not, with parts of a few windows."""
    block = draw(st.integers(1, 8))
    sizes = st.sampled_from([block, 2 * block]) if draw(st.booleans()) else st.integers(1, 3 * block)
    sets = draw(st.lists(st.lists(sizes, min_size=1, max_size=30), min_size=1, max_size=4))
    for own in sets:
        own += [draw(st.integers(1, 3 * block))] * draw(st.integers(0, 1))  # the last row group of a shard
        own += [0] * draw(st.integers(0, 2))  # `data.used_rows` leaves nothing
    weights = draw(st.lists(st.sampled_from([0.3, 1, 2, 5.5]), min_size=len(sets), max_size=len(sets)))
    by_epochs, seed = draw(st.booleans()), draw(st.integers(0, 2**40))
    window = draw(st.one_of(st.none(), st.integers(0, 7)))
    rows = [np.array(own, np.int64) for own in sets]
    try:
        return make_mixture(
            rows, weights, by_epochs, seed, block * draw(st.sampled_from([1, 2, 3, 4, 6])), block, window
        )
    except DataError:  # a set is smaller than its part of a step
        reject()


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


def block_rows(plan: BlockPlan, block: int) -> list[tuple[int, int, int]]:
    """The rows of a block: epoch, row group, row in the row group."""
    return next(window_blocks(plan.make_window(block)))


def epoch_blocks(plan: Plan, epoch: int) -> range:
    return range(epoch * plan.blocks_per_epoch, (epoch + 1) * plan.blocks_per_epoch)


def epoch_rows(plan: Plan, epoch: int) -> list[tuple[int, int, int]]:
    """The rows of an epoch, in order."""
    return [row for block in epoch_blocks(plan, epoch) for row in block_rows(plan, block)]
