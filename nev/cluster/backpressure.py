"""How far ahead Ray Data decodes, and how it waits: two small parts that `nev.data.stream` hands to its executor.

Left alone, Ray Data (2.60) does three things that cost this stream dearly:
- It decodes until its share of the object store is full, and then asks the tasks that hold finished output, without a pause,
  whether it may be read yet: on two cores that took 0.4 to 0.7 of a core from training, for a whole run.
- Its policy `DownstreamCapacity` lets the tasks that make block numbers wait in the middle, with their CPUs in hand, so that
  no CPU is left for the decoding that they wait for: streams of more than `NUMBERS_PER_TASK` blocks began 35 s late.
- Without that policy it makes all the block numbers of a run at once, millions of them in a long one.

`LookaheadBackpressure`, in place of Ray Data's policies, bounds the blocks under way, so that no task waits with its output.
`IdleSleep` lets the executor sleep for a moment after a turn that found nothing to do.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import ray.data
from ray.data import DataContext, ExecutionOptions
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators.task_pool_map_operator import TaskPoolMapOperator

from nev.common.imports import import_uninterrupted

AHEAD_KEY, BYTES_KEY = "nev.blocks_ahead", "nev.block_bytes"
NUMBER_OPERATORS = ("ReadRange", "StreamingRepartition")
BLOCKS_A_CPU = 4  # a CPU reads two blocks of small pictures while the executor waits for its tasks
PAUSE_S = 0.1  # as long as the executor itself waits for a task


def limit_lookahead(context: DataContext, blocks_ahead: int, block_bytes: int) -> None:
    """Let streams under `context` hold at most `blocks_ahead` blocks that are being read or wait to be taken.

    Where that would leave CPUs of the cluster without work, it is `BLOCKS_A_CPU` for each instead; where that many blocks of
    `block_bytes` are more than half of what Ray Data may keep in the object store, it is that half, but a block at least.
    """
    context.set_config(AHEAD_KEY, blocks_ahead)
    context.set_config(BYTES_KEY, block_bytes)
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [LookaheadBackpressure])
    context.custom_execution_callback_classes = [IdleSleep]


def enough_blocks(blocks_ahead: int, block_bytes: int, cpus: float, store_bytes: float) -> float:
    """How many blocks may be under way (see `limit_lookahead`); `store_bytes` is what Ray Data may keep in the object store.

    In the first second of a stream the executor knows neither yet and says 0: `blocks_ahead` alone counts then.
    """
    if not store_bytes:
        return float(blocks_ahead)
    return max(1.0, min(max(blocks_ahead, BLOCKS_A_CPU * cpus), store_bytes / 2 // block_bytes))


class LookaheadBackpressure(BackpressurePolicy):
    """Starts no task while enough is under way: block numbers, or blocks being read and those not yet taken."""

    def can_add_input(self, op: Any) -> bool:
        """Whether `op` may start a task now."""
        if not isinstance(op, TaskPoolMapOperator):
            return True
        operators = list(self._topology)
        behind = operators[operators.index(op) :]
        limits = self._resource_manager.get_global_limits()
        ahead, size = (self._data_context.get_config(key) for key in (AHEAD_KEY, BYTES_KEY))
        enough = enough_blocks(ahead, size, limits.cpu, limits.object_store_memory)
        if op.name.startswith(NUMBER_OPERATORS):
            waiting = self._topology[behind[1]].total_enqueued_input_blocks()
            return bool(op.num_active_tasks() == 0 and waiting < enough)
        waiting = sum(self._topology[one].total_enqueued_output_blocks() for one in behind)
        return bool(op.num_active_tasks() + waiting < enough)


class IdleSleep(ExecutionCallback):
    """Lets a turn of the executor that neither started nor finished anything last `PAUSE_S` at least."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, int, int]] = []
        self._end = 0.0

    def on_execution_step(self, executor: Any) -> None:
        """Called by the executor at the end of every turn, which may have waited for its tasks up to 0.1 s itself."""
        metrics = [op.metrics for op in executor._topology]
        now = [(one.num_tasks_submitted, one.num_outputs_taken, one.num_tasks_finished) for one in metrics]
        if now == self._seen:
            time.sleep(max(0.0, self._end + PAUSE_S - time.monotonic()))
        self._seen, self._end = now, time.monotonic()


NUMBERS_BUFFERED = 64  # by default a task makes two and waits until they are fetched, a turn of 0.1 s later


DEATHS = (
    5  # of the process over one block: lost nodes, or a picture that kills its decoder. By default Ray tries for ever
)


@functools.lru_cache(maxsize=4)
def load_from_store(reference: ray.ObjectRef[Any]) -> Any:
    """The reader and the plan, fetched once a process: with them live its open files and the epoch's order."""
    import_uninterrupted("torch")
    import torch

    torch.set_num_threads(1)  # one task a core: threads inside a task would only get in each other's way
    return ray.get(reference)


def stream_context(blocks_ahead: int, block_bytes: int) -> DataContext:
    """A copy of this process's DataContext with what the stream needs (see `nev.cluster.backpressure`)."""
    context = DataContext.get_current().copy()
    limit_lookahead(context, blocks_ahead, block_bytes)
    context._max_num_blocks_in_streaming_gen_buffer = NUMBERS_BUFFERED
    context.target_max_block_size = None
    context.execution_no_progress_timeout_s = (
        -1
    )  # a trainer that validates for an hour, or waits for nodes, is no failure
    context.op_resource_reservation_enabled = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.memory_usage_poll_interval_s = None  # or Ray would start and end a thread for every block
    context.execution_options = stream_options()
    return context


def stream_options() -> ExecutionOptions:
    """Blocks in order."""
    return ExecutionOptions(preserve_order=True)
