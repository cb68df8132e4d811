"""The stream: the plan's blocks, whole and in order, through Ray Data and the split that Ray Train makes of it."""

import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.pictures import WIDTH, encode, rows_of, write_shard

from nev.config.data import Augment, Columns, Limits
from nev.data.block import Block, BlockReader, EncodedRows
from nev.data.block_plan import Segment
from nev.data.index import build_index
from nev.data.plan import Plan
from nev.data.text_sidecar import sidecar_key, write_sidecar

pytestmark = pytest.mark.ray

KEY = sidecar_key("tower", "caption")


def reader_over(folder: Path, count: int, image_size: int = 8) -> BlockReader:
    """`count` rows in two shards with row groups of unequal sizes, every fifth one damaged, with their sidecars."""
    rows = rows_of(count)
    for row in rows[::5]:
        row["image"] = row["image"][:100]
    groups = [5, 1, 7]
    while sum(groups) < count // 2:
        groups.append(min(6, count // 2 - sum(groups)))
    write_shard(folder / "a.parquet", rows[: sum(groups)], groups)
    write_shard(folder / "b.parquet", rows[sum(groups) :], [count - sum(groups)])
    index = build_index(str(folder), Columns())
    for shard in range(2):
        write_sidecar(index, shard, KEY, WIDTH, encode)
    return BlockReader(index, image_size, Limits(), 5, Augment(scale=(0.5, 1.0), flip=True), KEY, WIDTH)


def splits(stream: Any, world: int, dawdle: bool = False) -> list[list[Block]]:
    """What each of W ranks gets, taken at the same time, from the split that Ray Train makes under nev's configuration."""
    from nev.data.stream import RoundRobinSplit

    streams = dict(enumerate(stream)) if isinstance(stream, list) else {0: stream}
    of_ranks = RoundRobinSplit(len(streams)).configure(streams, world, None, None)
    shards = [shares[rank * len(streams) // world] for rank, shares in enumerate(of_ranks)]

    def take(rank: int) -> list[Block]:
        pauses = random.Random(rank)
        blocks = []
        for block in shards[rank].iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2):
            blocks.append(block)
            if dawdle:
                time.sleep(pauses.random() * 0.05 * (rank + 1))
        return blocks

    with ThreadPoolExecutor(world) as ranks:
        return list(ranks.map(take, range(world)))


def assert_block(block: Block, number: int, reader: BlockReader, plan: Plan) -> None:
    """The block is block `number` of the plan, bit for bit, as the reader alone would read it."""
    expected = next(reader.read_blocks(plan.make_window(number)))
    assert block["block"].tolist() == [number] * plan.block_rows
    assert block.keys() == {*expected, "block"}
    for name, column in expected.items():
        assert block[name].shape == column.shape, name
        assert np.array_equal(block[name], column), name
        assert name in ("uid", "reason") or block[name].dtype == column.dtype, name


@pytest.mark.parametrize(("world", "window"), [(2, 0), (3, 2)])
def test_rank_r_gets_the_blocks_that_the_plan_gives_it(
    world: int, window: int, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nev.data import stream

    monkeypatch.setattr(stream, "NUMBERS_PER_TASK", 3)  # block numbers come from several read tasks
    reader = reader_over(tmp_path, 71)
    plan = Plan(reader.index.rows, 9, global_batch=12, block_rows=3, window=window)
    assert plan.blocks_per_window >= window
    first, last = 3, 8  # begins amid epoch 0, ends amid epoch 1
    assert first < plan.steps_per_epoch < last < 2 * plan.steps_per_epoch
    taken = splits(stream.make_stream(reader, plan, first, last), world, dawdle=True)
    for rank, blocks in enumerate(taken):
        numbers = [
            number for step in range(first, last) for number in plan.rank_blocks(step, rank, world, first_step=first)
        ]
        assert len(blocks) == len(numbers)
        for block, number in zip(blocks, numbers, strict=True):
            assert_block(block, number, reader, plan)
    valid = np.concatenate([block["valid"] for blocks in taken for block in blocks])
    assert len(valid) == 5 * 12
    assert 0 < (~valid).sum() < 30  # the damaged rows are there, in blocks of full size


def test_two_streams_give_each_rank_its_blocks(ray_cluster: None, tmp_path: Path) -> None:
    """Four ranks, two a stream: windows of two row groups, of which some lie across the two streams."""
    from nev.data.stream import make_streams

    reader = reader_over(tmp_path, 71)
    plan = Plan(reader.index.rows, 9, global_batch=24, block_rows=3, window=2)
    first, last = 1, 4
    streams = make_streams(reader, plan, first, last, streams=2)
    for rank, blocks in enumerate(splits(streams, 4, dawdle=True)):
        numbers = [number for step in range(first, last) for number in plan.rank_blocks(step, rank, 4, first, 2)]
        assert len(blocks) == len(numbers) == 2 * (last - first)
        for block, number in zip(blocks, numbers, strict=True):
            assert_block(block, number, reader, plan)


def test_the_world_may_change_in_the_middle(ray_cluster: None, tmp_path: Path) -> None:
    """Stopped and started with other numbers of ranks: the rows of every step are those of an undisturbed run."""
    from nev.data.stream import make_stream

    reader = reader_over(tmp_path, 71)
    plan = Plan(reader.index.rows, 9, global_batch=12, block_rows=3, window=3)
    rows_of_step: dict[int, list[str]] = {}
    for world, first, last in ((1, 0, 2), (4, 2, 4), (3, 4, 5), (2, 5, 7)):  # amid the first epoch and into the second
        for blocks in splits(make_stream(reader, plan, first, last), world):
            for block in blocks:
                number = int(block["block"][0])
                assert_block(block, number, reader, plan)
                rows_of_step.setdefault(number // plan.blocks_per_step, []).extend(block["uid"])
    undisturbed = make_stream(reader, plan, 0, 7).iter_batches(batch_size=None, batch_format="numpy")
    uids = [uid for block in undisturbed for uid in block["uid"]]
    assert {step: sorted(rows) for step, rows in rows_of_step.items()} == {
        step: sorted(uids[12 * step : 12 * step + 12]) for step in range(7)
    }


def test_any_step_is_reached_without_those_before_it(ray_cluster: None, tmp_path: Path) -> None:
    from nev.data.stream import make_stream

    reader = reader_over(tmp_path, 40)
    plan = Plan(reader.index.rows, 1, global_batch=8, block_rows=8, window=2)
    far = 10**9 * plan.steps_per_epoch + 2
    stream = make_stream(reader, plan, far, far + 2)
    assert stream.context.execution_options.preserve_order  # also where no DataConfig says so
    blocks = list(stream.iter_batches(batch_size=None, batch_format="numpy"))
    assert len(blocks) == 2
    for number, block in enumerate(blocks, far):
        assert_block(block, number, reader, plan)
    assert list(make_stream(reader, plan, far, far).iter_batches(batch_size=None)) == []


def test_blocks_larger_than_ray_would_make_them_come_one_by_one(ray_cluster: None, tmp_path: Path) -> None:
    from ray.data import DataContext

    from nev.data.stream import make_stream

    reader = reader_over(tmp_path, 300, image_size=224)
    plan = Plan(reader.index.rows, 2, global_batch=256, block_rows=128, window=len(reader.index.rows))
    context = DataContext.get_current().copy()
    context.target_max_block_size = 2**20  # a block of 128 rows has 19 MB: Ray would cut it in pieces
    with DataContext.current(context):
        stream = make_stream(reader, plan, 0, 2)
    taken = splits(stream, 2)
    for rank in range(2):
        assert [block["image"].nbytes for block in taken[rank]] == [128 * 224 * 224 * 3] * 2
        for step in range(2):
            assert_block(taken[rank][step], 2 * step + rank, reader, plan)


def test_tiny_blocks_are_not_merged(ray_cluster: None, tmp_path: Path) -> None:
    from ray.data import DataContext

    from nev.data.stream import make_stream

    reader = reader_over(tmp_path, 45, image_size=4)
    plan = Plan(reader.index.rows, 2, global_batch=2, block_rows=1, window=2)
    before = DataContext.get_current().copy()
    taken = splits(make_stream(reader, plan, 0, 22), 2)
    for rank in range(2):
        assert [block["block"].tolist() for block in taken[rank]] == [[number] for number in range(rank, 44, 2)]
    after = DataContext.get_current()
    assert after.target_max_block_size == before.target_max_block_size  # the process's own context is left alone
    assert after.execution_options.preserve_order == before.execution_options.preserve_order


def test_a_shard_that_vanishes_stops_the_stream_with_its_name(ray_cluster: None, tmp_path: Path) -> None:
    from nev.data.stream import make_stream

    reader = reader_over(tmp_path, 40)
    plan = Plan(reader.index.rows, 1, global_batch=8, block_rows=8)
    stream = make_stream(reader, plan, 0, plan.steps_per_epoch)
    (tmp_path / "b.parquet").unlink()
    with pytest.raises(Exception, match=r"b\.parquet: row group 0 cannot be read"):
        list(stream.iter_batches(batch_size=None))


def test_a_task_with_more_than_one_number_is_refused() -> None:
    from nev.data.stream import read_window

    with pytest.raises(RuntimeError, match="the numbers of 2 windows, not of one"):
        next(read_window({"id": np.array([4, 5])}, []))


class Deadly(BlockReader):
    """Its process dies over a row group of the second shard, again and again, as over a picture that crashes its decoder."""

    def load(self, segments: list[Segment]) -> EncodedRows:
        if segments[0].group == self.index.shard.searchsorted(1):
            os._exit(1)
        return super().load(segments)


def test_a_block_that_always_kills_its_process_ends_the_stream(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import cloudpickle
    from ray.exceptions import WorkerCrashedError

    from nev.data.stream import make_stream

    monkeypatch.setattr("nev.data.stream.MAX_RETRIES", 1)  # each is the start of another process
    fine = reader_over(tmp_path, 52)
    deadly = Deadly(fine.index, 8, fine.limits, fine.seed, fine.augment, KEY, WIDTH)
    plan = Plan(fine.index.rows, 3, global_batch=4, block_rows=4)
    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)  # Ray's processes could not import it
    try:
        with pytest.raises(WorkerCrashedError):
            list(make_stream(deadly, plan, 0, plan.steps_per_epoch).iter_batches(batch_size=None))
    finally:
        cloudpickle.unregister_pickle_by_value(here)


@dataclass(frozen=True)
class DiesOnce(BlockReader):
    """Its process dies once in the middle of a window, when the first blocks of the window are delivered."""

    mark: str = ""

    def decode(self, rows: EncodedRows, chosen: Any = None, pictures: Any = None) -> Block:
        block = super().decode(rows, chosen, pictures)
        mark = Path(self.mark)
        if mark.exists() and mark.stat().st_size >= 3:
            mark.unlink()
            os._exit(1)
        if mark.exists():
            with mark.open("a") as file:
                file.write("x")
        return block


def test_a_task_that_dies_amid_a_window_gives_every_block_once(tmp_path: Path, ray_cluster: None) -> None:
    from ray import cloudpickle

    from nev.data.stream import make_stream

    fine = reader_over(tmp_path, 52)
    (tmp_path / "mark").touch()
    reader = DiesOnce(fine.index, 8, fine.limits, fine.seed, fine.augment, KEY, WIDTH, mark=str(tmp_path / "mark"))
    plan = Plan(fine.index.rows, 3, global_batch=4, block_rows=4, window=len(fine.index.rows))
    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)  # Ray's processes could not import it
    try:
        blocks = list(make_stream(reader, plan, 0, plan.steps_per_epoch).iter_batches(batch_size=None))
    finally:
        cloudpickle.unregister_pickle_by_value(here)
    assert not (tmp_path / "mark").exists(), "no process died"
    assert len(blocks) == plan.blocks_per_epoch > 6
    for number, block in enumerate(blocks):
        assert_block(block, number, fine, plan)


def test_what_a_rank_fetches_ahead_fits_the_object_store() -> None:
    from nev.train.worker.blocks import fetch_ahead

    plan = Plan(np.full(1000, 256, np.int64), 0, global_batch=1024, block_rows=256)
    assert fetch_ahead(plan, 1, 10, 1e9) == 8  # two steps
    assert fetch_ahead(plan, 4, 10, 1e9) == 2
    assert fetch_ahead(plan, 1, 40_000_000, 800e6) == 5  # a quarter of the store
    assert fetch_ahead(plan, 2, 40_000_000, 800e6) == 2
    assert fetch_ahead(plan, 1, 40_000_000, 1e6) == 1
