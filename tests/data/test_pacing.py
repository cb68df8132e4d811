"""Pacing: how far ahead the stream reads, and that its executor sleeps while nothing can be done."""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.pictures import WIDTH, encode, rows_of, write_shard

from nev.config.data import Columns, Limits
from nev.data.block import Block, BlockReader, EncodedRows
from nev.data.index import build_index
from nev.data.plan import Plan
from nev.data.text_sidecar import sidecar_key, write_sidecar

pytestmark = pytest.mark.ray

KEY = sidecar_key("tower", "caption")
AHEAD = 4 * 2  # four blocks for each of the two CPUs; more than two steps of two blocks


def counting_reader(folder: Path, count: int) -> BlockReader:
    """A reader of row groups of two rows. For every block that it decodes it leaves a file in `folder/read`, which holds the
    scheduling class of the process.
    """

    @dataclass(frozen=True)
    class Counting(BlockReader):
        log: str = ""

        def decode(self, rows: EncodedRows, chosen: Any = None, pictures: Any = None) -> Block:
            name = f"{rows.epochs[chosen[0]]}-{rows.columns['uid'][chosen[0]]}"
            Path(self.log, name).write_text(str(os.sched_getscheduler(0)))
            return super().decode(rows, chosen, pictures)

    (folder / "read").mkdir()
    write_shard(folder / "a.parquet", rows_of(count), [2] * (count // 2))
    index = build_index(str(folder), Columns())
    write_sidecar(index, 0, KEY, WIDTH, encode)
    return Counting(index, 8, Limits(), 5, None, KEY, WIDTH, log=str(folder / "read"))


def test_decoding_leaves_the_cpu_to_training(ray_cluster: None, tmp_path: Path) -> None:
    from nev.data.stream import make_stream

    reader = counting_reader(tmp_path, 24)
    stream = make_stream(reader, Plan(reader.index.rows, 9, global_batch=8, block_rows=4), 0, 3)
    assert sum(1 for _ in stream.iter_batches(batch_size=None)) == 6
    classes = [int(file.read_text()) for file in (tmp_path / "read").iterdir()]
    assert set(classes) == {os.SCHED_IDLE}
    assert os.sched_getscheduler(0) != os.SCHED_IDLE


def test_a_sandbox_without_that_class_decodes_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from nev.cluster.backpressure import let_training_go_first

    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    let_training_go_first()


@pytest.mark.parametrize(
    ("ahead", "size", "task", "cpus", "store", "expected"),
    [
        (8, 1, 1, 2, 1e9, 8),  # two steps
        (8, 1, 1, 64, 1e9, 256),  # work for every CPU
        (8, 1, 4, 2, 1e9, 16),  # a task that decodes and one that waits, for every CPU
        (8, 100, 1, 64, 1000, 5),  # half of the memory
        (8, 100, 4, 64, 1000, 5),
        (8, 100, 1, 64, 10, 1),  # a block at least, or nothing would ever move
        (8, 100, 1, 0, 0, 8),  # a stream's first second: CPUs and memory are not known yet
    ],
)
def test_what_is_enough(ahead: int, size: int, task: int, cpus: float, store: float, expected: int) -> None:
    from nev.cluster.backpressure import max_blocks

    assert max_blocks(ahead, size, task, cpus, store) == expected


def test_as_many_tasks_run_as_have_room_for_their_blocks() -> None:
    from nev.cluster.backpressure import max_tasks

    assert max_tasks(8, 0, 100, 4, 2000) == 10  # Ray Data names a quarter of the store: half of it are 40 blocks
    assert max_tasks(8, 12, 100, 4, 2000) == 7
    assert max_tasks(8, 0, 100, 100, 2000) == 1  # a window larger than that still moves
    assert max_tasks(8, 0, 100, 4, 0) == 2  # a stream's first second: memory is not known yet
    assert max_tasks(8, 0, 100, 40, 0) == 1
    # A node of 2 GB a CPU, blocks of 256 rows at 224 px: all CPUs have work.
    assert max_tasks(8, 0, 38_600_000, 4, 16 * 150e6) >= 0.95 * 16


@pytest.mark.parametrize(("window", "ahead"), [(1, AHEAD), (4, 2 * 4 * 2)])
def test_a_consumer_that_does_not_take_holds_the_reading_back(
    window: int, ahead: int, ray_cluster: None, tmp_path: Path
) -> None:
    """Four blocks for each of the two CPUs; with windows of four blocks, two tasks."""
    from nev.data.stream import make_stream

    reader = counting_reader(tmp_path, 120)
    plan = Plan(reader.index.rows, 1, global_batch=4, block_rows=2, window=window)
    blocks = iter(make_stream(reader, plan, 0, 30).iter_batches(batch_size=None, prefetch_batches=0))
    for taken in range(1, 4):
        next(blocks)
        time.sleep(1.0)  # far longer than it takes to read all 60
        read = len(list((tmp_path / "read").iterdir()))
        assert taken <= read <= taken + ahead + 2 * window, "a task may begin while there is room for one block"
    assert sum(1 for _ in blocks) == 60 - 3
    assert len(list((tmp_path / "read").iterdir())) == 60


def test_the_executor_sleeps_while_the_consumer_does_not_take(ray_cluster: None, tmp_path: Path) -> None:
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    from nev.cluster.backpressure import PAUSE_S
    from nev.data.stream import make_stream

    turns = []

    class Count(ExecutionCallback):
        def on_execution_step(self, executor: Any) -> None:
            turns.append(time.monotonic())

    reader = counting_reader(tmp_path, 120)
    plan = Plan(reader.index.rows, 1, global_batch=4, block_rows=2)
    stream = make_stream(reader, plan, 0, 30)
    stream.context.custom_execution_callback_classes.append(Count)
    blocks = iter(stream.iter_batches(batch_size=None, prefetch_batches=0))
    next(blocks)
    time.sleep(1.0)
    before, begin = len(turns), time.monotonic()
    assert before, "the executor runs in this process, so its turns are seen"
    time.sleep(1.0)
    assert len(turns) - before <= 2 * (time.monotonic() - begin) / PAUSE_S  # without a pause it is some thousands
    assert sum(1 for _ in blocks) == 59


def test_block_numbers_leave_a_cpu_to_the_reading(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of weeks has millions of them: made all at once, they would hold every CPU before the first block is read."""
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    from nev.cluster.backpressure import NUMBER_OPERATORS
    from nev.data import stream

    running: dict[str, int] = {}
    started: dict[str, int] = {}

    class Watch(ExecutionCallback):
        def on_execution_step(self, executor: Any) -> None:
            for op in executor._topology:
                if op.name.startswith(NUMBER_OPERATORS):
                    running[op.name] = max(running.get(op.name, 0), op.num_active_tasks())
                    started[op.name] = op.metrics.num_tasks_submitted

    monkeypatch.setattr(stream, "NUMBERS_PER_TASK", 20)
    reader = counting_reader(tmp_path, 8)
    data = stream.make_stream(reader, Plan(reader.index.rows, 1, global_batch=4, block_rows=2), 0, 200)  # 20 tasks
    data.context.custom_execution_callback_classes.append(Watch)
    blocks = iter(data.iter_batches(batch_size=None, prefetch_batches=0))
    taken: list[Any] = []
    taker = threading.Thread(target=lambda: taken.extend(itertools.islice(blocks, 4)), daemon=True)
    taker.start()
    taker.join(60)
    time.sleep(1.0)  # nothing is taken meanwhile
    assert list(running.values()) == [1, 1], running
    made, passed_on = started.values()
    assert passed_on <= 3, started  # 20 numbers each, and so many blocks are not under way
    assert made <= passed_on + AHEAD + 1, started  # of 20: those passed on, those that wait, and one that runs
    assert len(taken) == 4
