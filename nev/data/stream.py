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
from nev.data.block import Block
from nev.data.block_plan import BlockPlan
from nev.data.mixture_reader import Reader
from nev.data.windows import make_windows, task_blocks
from nev.storage.traffic import take_read_bytes

NUMBERS_PER_TASK = 1000
NUMBER_TASKS = 1000  # upper bound: each task is put into the object store before the first one runs
STEPS_AHEAD = (
    2  # steps whose blocks may be decoded ahead; each rank fetches two more (`nev.train.worker.blocks.iterate_blocks`)
)


def make_stream(reader: Reader, plan: BlockPlan, first_step: int, last_step: int, run: str = "") -> Dataset:
    """The one stream of a run that has no more: as `make_streams` has it."""
    return make_streams(reader, plan, first_step, last_step, run)[0]


def make_streams(
    reader: Reader, plan: BlockPlan, first_step: int, last_step: int, run: str = "", streams: int = 1
) -> list[Dataset]:
    """The blocks of steps [first_step, last_step) that each stream hands out, in the order of the plan, as lazy Ray data sets.

    Each block has the columns of `BlockReader.read`, and `block`: int64 [R], the number of the block in the plan.
    run: name of the run, whose tasks count what they read from S3 in Ray's metrics; "" for no count.
    streams: number of streams, each with an equal part of a step, as `BlockPlan.stream_blocks` has it.
    """
    first, last = (plan.step_blocks(step).start for step in (first_step, last_step))
    windows = [make_windows(plan, first, last, stream, streams) for stream in range(streams)]
    # One object for all streams, since a process decodes for each of them: it then has one reader and one plan.
    source = ray.put((reader, windows))
    step_blocks = plan.blocks_per_step // streams
    datasets = []
    for stream, of_stream in enumerate(windows):
        context = stream_context(
            STEPS_AHEAD * step_blocks, plan.block_rows * reader.row_bytes, task_blocks(plan, streams)
        )
        context.custom_execution_callback_classes = [KeepBlocks, *context.custom_execution_callback_classes]
        placement = place_decoding(context, step_blocks, streams)
        with DataContext.current(context):
            tasks = min(max(1, len(of_stream) // NUMBERS_PER_TASK), NUMBER_TASKS)
            numbers = ray.data.range(len(of_stream), override_num_blocks=tasks)
            read = functools.partial(read_window, source=[source], stream=stream, run=run)
            one_each = numbers.repartition(target_num_rows_per_block=1)
            datasets.append(one_each.map_batches(read, batch_size=1, num_cpus=1, max_retries=MAX_RETRIES, **placement))
    return datasets


def read_window(numbers: Any, source: list[ray.ObjectRef[Any]], stream: int = 0, run: str = "") -> Iterator[Block]:
    """The Ray Data task: the number of one window of a stream in, the blocks of that window out."""
    if len(numbers["id"]) != 1:
        raise RuntimeError(
            f"a task got the numbers of {len(numbers['id'])} windows, not of one: the order would be lost"
        )
    let_training_go_first()
    reader, windows = load_from_store(source[0])
    window = windows[stream][int(numbers["id"][0])]
    rows = windows[stream].plan.block_rows
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
    """Gives block i of a stream to rank i mod W of the stream's W ranks, as soon as the block is ready.

    Ray's default split holds blocks back and divides the last blocks, so that all ranks get the same number of rows.
    streams: of the run. Each has an equal part of the ranks, in order.
    """

    def __init__(self, streams: int = 1) -> None:
        super().__init__()
        self._streams = streams

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *_: Any, **__: Any
    ) -> list[dict[str, DataIterator]]:
        """For each rank, its share of each stream; of a stream that is not its own, a share of another rank.

        Ray Train calls this for each stream when rank 0 asks for it.
        """
        ranks = world_size // self._streams
        splits = {name: stream.streaming_split(ranks, equal=False) for name, stream in datasets.items()}
        return [{name: shares[rank % ranks] for name, shares in splits.items()} for rank in range(world_size)]
