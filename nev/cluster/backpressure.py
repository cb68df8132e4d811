"""Limits on how far ahead Ray Data decodes, and a pause of its executor when there is nothing to do. `nev.data.stream` uses both.

Ray Data's defaults (2.60) have three problems for this stream:
- It decodes until its share of the object store is full. Then its executor asks the tasks that hold finished output in a busy
  loop: on two cores this took 0.4 to 0.7 of a core from training, for a whole run.
- Its policy `DownstreamCapacity` stops the tasks that make the numbers of windows in the middle, while they hold their CPUs. No
  CPU is left for the decoding that they wait for: streams of more than `NUMBERS_PER_TASK` windows began 35 s late.
- Without that policy it makes all numbers of a run at once, millions in a long run.

`LookaheadBackpressure` replaces Ray Data's policies and limits the number of blocks in progress, so that no task waits with its
output. `IdleSleep` makes the executor sleep after a turn without any change.
"""

from __future__ import annotations

import functools
import math
import os
import time
from contextlib import suppress
from typing import Any

import ray.data
from ray.data import DataContext, ExecutionOptions
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators.task_pool_map_operator import TaskPoolMapOperator
from ray.data._internal.output_buffer import OutputBlockSizeOption

from nev.common.imports import import_uninterrupted

AHEAD_KEY, BYTES_KEY, TASK_KEY = "nev.blocks_ahead", "nev.block_bytes", "nev.task_blocks"
CPUS_KEY = "nev.cpus"  # most tasks that decode at a time, where `nev.cluster.decoders` sets it
NUMBER_OPERATORS = ("ReadRange", "StreamingRepartition")
BLOCKS_A_CPU = 4  # a CPU reads two blocks of small pictures while the executor waits for its tasks
TASKS_A_CPU = 2  # one that decodes, and one whose blocks wait for those of the tasks before it
PAUSE_S = 0.1  # time for which the executor itself waits for a task
BUFFERED_NUMBERS = (
    64  # numbers, or blocks, that a task makes ahead. Ray's default is two, and the next two come 0.1 s later
)
MAX_RETRIES = (
    5  # of a task whose process has died: a node was lost, or a picture crashes its decoder. Ray's default is no limit
)


def limit_lookahead(context: DataContext, blocks_ahead: int, block_bytes: int, task_blocks: int) -> None:
    """Limit the blocks of streams under `context` that are being read or wait for a consumer to `max_blocks`."""
    context.set_config(AHEAD_KEY, blocks_ahead)
    context.set_config(BYTES_KEY, block_bytes)
    context.set_config(TASK_KEY, task_blocks)
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [LookaheadBackpressure])
    context.custom_execution_callback_classes = [IdleSleep]


def max_blocks(blocks_ahead: int, block_bytes: int, task_blocks: int, cpus: float, store_bytes: float) -> float:
    """The most blocks that a stream may read or hold at a time, where a task counts as one block until it has made more.

    blocks_ahead: the limit that the stream asks for. It is raised to `BLOCKS_A_CPU` blocks, and `TASKS_A_CPU` tasks, per CPU, so
        that all CPUs have work.
    block_bytes: size of a block. All blocks take at most half of `store_bytes`; one block is always allowed.
    task_blocks: blocks of a task.
    cpus: of the cluster.
    store_bytes: share of Ray Data in the object store. 0 in the first second of a stream, when the executor knows neither this
        nor the CPUs: then the limit is `blocks_ahead`.
    """
    if not store_bytes:
        return float(blocks_ahead)
    enough = max(blocks_ahead, BLOCKS_A_CPU * cpus, TASKS_A_CPU * task_blocks * cpus)
    return max(1.0, min(enough, store_bytes / 2 // block_bytes))


def max_tasks(blocks_ahead: int, ready: int, block_bytes: int, task_blocks: int, store_bytes: float) -> float:
    """The most tasks that may run, so that all of their blocks have room; one is always allowed.

    blocks_ahead: as `max_blocks` has it: the room while the store is not known.
    ready: blocks that wait for a consumer.
    store_bytes: as in `max_blocks`. Ray Data (2.60) names a quarter of the store, so twice that is free for all blocks.
    """
    room = 2 * store_bytes // block_bytes if store_bytes else blocks_ahead
    return max(1.0, (room - ready) // task_blocks)


class LookaheadBackpressure(BackpressurePolicy):
    """Starts no task while as many numbers wait, or as many blocks are read or wait, as `max_blocks` and `max_tasks` allow."""

    def can_add_input(self, op: Any) -> bool:
        """Whether `op` may start a task now."""
        if not isinstance(op, TaskPoolMapOperator):
            return True
        limit = blocks_limit(self._data_context, self._resource_manager)
        if op.name.startswith(NUMBER_OPERATORS):
            operators = list(self._topology)
            waiting = self._topology[operators[operators.index(op) + 1]].total_enqueued_input_blocks()
            return bool(op.num_active_tasks() == 0 and waiting < limit)
        cpus = self._data_context.get_config(CPUS_KEY, math.inf)
        ready, limits = count_ready(self._topology, op), self._resource_manager.get_global_limits()
        ahead, size, task_blocks = (self._data_context.get_config(key) for key in (AHEAD_KEY, BYTES_KEY, TASK_KEY))
        tasks = max_tasks(ahead, ready, size, task_blocks, limits.object_store_memory)
        queued = max(limits.cpu, (limit - ready) / task_blocks)  # a task that waits for a CPU has not made a block yet
        return bool(op.num_active_tasks() < min(cpus, limit - ready, tasks, queued))


def blocks_limit(context: DataContext, resource_manager: Any) -> float:
    """`max_blocks` of a stream, in its executor."""
    limits = resource_manager.get_global_limits()
    ahead, size, task = (context.get_config(key) for key in (AHEAD_KEY, BYTES_KEY, TASK_KEY))
    return max_blocks(ahead, size, task, limits.cpu, limits.object_store_memory)


def count_ready(topology: Any, op: Any) -> int:
    """The blocks that the operator `op` has made and that wait for a consumer."""
    operators = list(topology)
    return sum(topology[operator].total_enqueued_output_blocks() for operator in operators[operators.index(op) :])


class KeepBlocks(ExecutionCallback):
    """Lets each block leave its task when it is made, unchanged. Add this to the callbacks of a stream's context.

    Ray Data (2.60) would merge all blocks of a task, or those up to `target_max_block_size`.
    """

    def before_execution_starts(self, executor: Any) -> None:
        """Tell the transforms that decode. The executor calls this when its operators are there, before the first task."""
        for op in executor._topology:
            if isinstance(op, TaskPoolMapOperator) and not op.name.startswith(NUMBER_OPERATORS):
                for transform in op.get_map_transformer().get_transform_fns():
                    transform._output_block_size_option = OutputBlockSizeOption(disable_block_shaping=True)


class IdleSleep(ExecutionCallback):
    """Makes a turn of the executor last at least `PAUSE_S` if no task has started or finished in it."""

    def __init__(self) -> None:
        self._counts: list[tuple[int, int, int]] = []
        self._end = 0.0

    def on_execution_step(self, executor: Any) -> None:
        """Sleep for the rest of `PAUSE_S`. The executor calls this at the end of every turn, and may have waited itself."""
        metrics = [op.metrics for op in executor._topology]
        counts = [(op.num_tasks_submitted, op.num_outputs_taken, op.num_tasks_finished) for op in metrics]
        if counts == self._counts:
            time.sleep(max(0.0, self._end + PAUSE_S - time.monotonic()))
        self._counts, self._end = counts, time.monotonic()


def let_training_go_first() -> None:
    """Let this thread, and those that it starts, run only where nothing else wants the CPU. Linux alone has such a class.

    A decoding task would interrupt a training process for milliseconds, while the other threads of that process, and the other
    ranks, wait. Where blocks are scarce, training waits for them, and decoding has the CPU.
    """
    if hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):  # a sandbox may refuse the call
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


@functools.lru_cache(maxsize=4)
def load_from_store(reference: ray.ObjectRef[Any]) -> Any:
    """Load an object (a reader and a plan) once per process. The process then keeps open files and the order of the epoch."""
    import_uninterrupted("torch")
    import torch

    torch.set_num_threads(1)  # there is a task per core, so more threads would only compete
    return ray.get(reference)


def stream_context(blocks_ahead: int, block_bytes: int, task_blocks: int = 1) -> DataContext:
    """A copy of this process's DataContext with the settings of a stream: blocks in order, and with limits.

    blocks_ahead, block_bytes, task_blocks: as `max_blocks` has them.
    """
    context = DataContext.get_current().copy()
    limit_lookahead(context, blocks_ahead, block_bytes, task_blocks)
    context._max_num_blocks_in_streaming_gen_buffer = BUFFERED_NUMBERS
    context.target_max_block_size = None
    context.execution_no_progress_timeout_s = -1  # training may validate for an hour, or wait for nodes
    context.op_resource_reservation_enabled = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.memory_usage_poll_interval_s = None  # else Ray starts a thread for every block
    context.execution_options = ExecutionOptions(preserve_order=True)
    return context
