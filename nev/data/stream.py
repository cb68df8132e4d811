"""The stream: Ray Data runs the plan. Window numbers in, one stateless task a window, its blocks of exactly R rows out, in order.

Reasons for the settings (Ray 2.60). The blocks of a task leave it one by one and unchanged (`nev.cluster.backpressure`);
otherwise the output buffer merges and splits them. The default reservation per operator would leave cores idle. Numbers are
spread by a streaming repartition: with a read task for each window, all tasks would be put into the object store before the first
one runs (54 s for 20,000 tasks).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import DataContext, DataIterator, Dataset
from ray.train import DataConfig

from nev.cluster.backpressure import MAX_RETRIES, KeepBlocks, let_training_go_first, load_from_store, stream_context
from nev.cluster.decoders import place_decoding
from nev.cluster.metrics import S3_BYTES, Instruments
from nev.data.block import Block, BlockReader
from nev.data.plan import Plan
from nev.data.windows import make_windows
from nev.storage.traffic import take_read_bytes

NUMBERS_PER_TASK = 1000
NUMBER_TASKS = 1000  # upper bound: each task is put into the object store before the first one runs
STEPS_AHEAD = (
    2  # steps whose blocks may be decoded ahead; each rank fetches two more (`nev.train.worker.blocks.iterate_blocks`)
)


def make_stream(reader: BlockReader, plan: Plan, first_step: int, last_step: int, run: str = "") -> Dataset:
    """The blocks of steps [first_step, last_step), in the order of the plan, as a lazy Ray data set.

    Each block has the columns of `BlockReader.read`, and `block`: int64 [R], the number of the block in the plan.
    run: name of the run, whose tasks count what they read from S3 in Ray's metrics; "" for no count.
    """
    windows = make_windows(plan, plan.step_blocks(first_step).start, plan.step_blocks(last_step).start)
    block_bytes = plan.block_rows * reader.row_bytes
    context = stream_context(STEPS_AHEAD * plan.blocks_per_step, block_bytes, plan.blocks_per_window)
    context.custom_execution_callback_classes = [KeepBlocks, *context.custom_execution_callback_classes]
    placement = place_decoding(context, plan.blocks_per_step)
    with DataContext.current(context):
        source = ray.put((reader, windows))
        tasks = min(max(1, len(windows) // NUMBERS_PER_TASK), NUMBER_TASKS)
        numbers = ray.data.range(len(windows), override_num_blocks=tasks)
        read = functools.partial(read_window, source=[source], run=run)
        one_each = numbers.repartition(target_num_rows_per_block=1)
        return one_each.map_batches(read, batch_size=1, num_cpus=1, max_retries=MAX_RETRIES, **placement)


def read_window(numbers: Any, source: list[ray.ObjectRef[Any]], run: str = "") -> Iterator[Block]:
    """The Ray Data task: the number of one window in, the blocks of that window out."""
    if len(numbers["id"]) != 1:
        raise RuntimeError(
            f"a task got the numbers of {len(numbers['id'])} windows, not of one: the order would be lost"
        )
    let_training_go_first()
    reader, windows = load_from_store(source[0])
    rows = windows.plan.block_rows
    window = windows[int(numbers["id"][0])]
    for number, block in enumerate(reader.read_blocks(window, _block_memory(source[0], rows)), window.first):
        if run and (nbytes := take_read_bytes()):
            _instruments(run).add(S3_BYTES, nbytes)
        yield {**block, "block": np.full(rows, number, np.int64)}


@functools.lru_cache(maxsize=1)
def _instruments(run: str) -> Instruments:
    return Instruments({"run": run})


@functools.lru_cache(maxsize=1)
def _block_memory(source: ray.ObjectRef[Any], rows: int) -> NDArray[Any]:
    """Memory for the pictures of a block of a stream, reused by all of its blocks in a process.

    New memory pages would cost 2 to 6 % of the rate.

    Reuse is safe, because Ray has copied a block into the object store before it asks for the next one.
    """
    memory: NDArray[Any] = load_from_store(source)[0].allocate(rows)
    return memory


class RoundRobinSplit(DataConfig):
    """Gives block i of the stream to rank i mod W, as soon as the block is ready.

    Ray's default split holds blocks back and divides the last blocks, so that all ranks get the same number of rows.
    """

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *_: Any, **__: Any
    ) -> list[dict[str, DataIterator]]:
        """The data set of each rank. Ray Train calls this."""
        return [{"train": share} for share in datasets["train"].streaming_split(world_size, equal=False)]
