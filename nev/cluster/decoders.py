"""Nodes that decode come and go with the need of a stream, on a cluster that has or will have such nodes.

Ray Data's autoscaler (2.60) asks for twice the throughput whatever the consumers take, and repeats its last request for ever: no
decoder goes while a run trains. Here a stream asks for the CPUs that its consumers' pace takes, by its own measurement, and
decodes on no more. Tasks are packed on few nodes, so that the other nodes are idle and go.
"""

from __future__ import annotations

import math
import os
import time
from typing import Any, NamedTuple

import ray
from ray.data import DataContext
from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import STANDARD_RESOURCE_TYPES
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators.task_pool_map_operator import TaskPoolMapOperator

from nev.cluster.backpressure import CPUS_KEY, NUMBER_OPERATORS, blocks_limit, count_ready
from nev.cluster.session import may_grow

LABEL = {"nev.io/role": "decoder"}  # of nodes that are there to decode
ELSEWHERE = [{"label_selector": {"nev.io/role": "!decoder"}}]
INTERVAL_S = 5.0  # between two measurements
FIRST_S = 2.0  # after which a cluster that has said nothing of CPUs has none
EXPIRE_S = 60.0  # after which the request of a stream that has died is forgotten
SCARCE, PLENTY = 0.25, 0.75  # shares of the lookahead that are decoded and wait


def place_decoding(context: DataContext) -> dict[str, Any]:
    """Let the stream under `context` ask for what it needs, where nodes are there to decode. Returns Ray's options for its tasks.

    They run on decoders first. On one machine, and on a cluster without decoders, nothing changes.
    """
    if not (may_grow() and has_decoders()):
        return {}
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, AskForNeed]
    # Ray Data's default, SPREAD, gives every node a task now and then, so that no node is ever idle.
    return {"scheduling_strategy": "DEFAULT", "label_selector": LABEL, "fallback_strategy": ELSEWHERE}


def has_decoders() -> bool:
    """Whether nodes have the label `LABEL`, or will have it: the variable `NEV_DECODERS` says so where the head starts."""
    if os.environ.get("NEV_DECODERS"):
        return True
    nodes: list[Any] = ray.nodes()  # type: ignore[no-untyped-call]
    return any(LABEL.items() <= node["Labels"].items() for node in nodes if node["Alive"])


class Measured(NamedTuple):
    """What a stream has done since its start.

    seconds: at the measurement.
    consumed: blocks that the consumers have taken.
    tasks: blocks that are decoded.
    task_s: time that their tasks took, in seconds.
    active: tasks that run.
    ready: share of the lookahead that is decoded and waits for a consumer.
    """

    seconds: float
    consumed: int
    tasks: int
    task_s: float
    active: int
    ready: float


def decide_cpus(cpus: int, before: Measured, now: Measured) -> int:
    """The CPUs that a stream needs from now on.

    cpus: so far. before, now: two measurements.
    Where blocks are scarce though all CPUs decode, the CPUs double. Where blocks are plenty, the CPUs fall to what the consumers'
    pace takes. A node that boots, or a process that starts, is waited for.
    """
    if now.ready < SCARCE and now.active >= cpus and now.tasks > before.tasks:
        return 2 * cpus
    if now.ready > PLENTY and now.tasks:
        pace = (now.consumed - before.consumed) / max(now.seconds - before.seconds, 1e-9)
        return min(cpus, max(1, math.ceil(pace * now.task_s / now.tasks)))
    return cpus


class StreamAutoscaler(ClusterAutoscaler):
    """Asks the cluster for as many CPUs as a stream needs, in the place of Ray Data's autoscaler.

    replaced: Ray Data's own, which knows the cluster's coordinator.
    executor: of the stream.
    """

    def __init__(self, replaced: Any, executor: Any) -> None:
        self._replaced, self._executor = replaced, executor
        self._start, self._cpus = time.monotonic(), 0
        self._before = Measured(0.0, 0, 0, 0.0, 0, 0.0)

    def try_trigger_scaling(self) -> None:
        """Measure, and ask anew. The executor calls this in every turn."""
        now = time.monotonic()
        if now - self._before.seconds < INTERVAL_S:
            return
        if not self._cpus:  # a stream begins with the CPUs that are there
            there = math.floor(self._replaced.get_total_resources().cpu or 0)
            if not there and now - self._start < FIRST_S:
                return
            self._cpus, self._before = max(1, there), self._measure(now)
        else:
            before, self._before = self._before, self._measure(now)
            self._cpus = decide_cpus(self._cpus, before, self._before)
        self._executor._data_context.set_config(CPUS_KEY, self._cpus)
        self._replaced._autoscaling_coordinator.request_resources(
            [{"CPU": 1}] * self._cpus,
            EXPIRE_S,
            request_remaining=STANDARD_RESOURCE_TYPES,
            label_selectors=[LABEL] * self._cpus,
        )

    def _measure(self, seconds: float) -> Measured:
        topology = self._executor._topology
        maps = (op for op in topology if isinstance(op, TaskPoolMapOperator))
        decode, last = next(op for op in maps if not op.name.startswith(NUMBER_OPERATORS)), list(topology)[-1]
        limit = blocks_limit(self._executor._data_context, self._executor._resource_manager)
        return Measured(
            seconds=seconds,
            consumed=last.metrics.num_outputs_taken - topology[last].total_enqueued_output_blocks(),
            tasks=decode.metrics.num_tasks_finished,
            task_s=decode.metrics.task_completion_time_s,
            active=decode.num_active_tasks(),
            ready=count_ready(topology, decode) / limit,
        )

    def on_executor_shutdown(self) -> None:
        """Take the request back."""
        self._replaced.on_executor_shutdown()

    def get_total_resources(self) -> Any:
        """What the stream may use."""
        return self._replaced.get_total_resources()


class AskForNeed(ExecutionCallback):
    """Puts `StreamAutoscaler` in the place of Ray Data's autoscaler."""

    def before_execution_starts(self, executor: Any) -> None:
        """The executor calls this when its parts are there."""
        executor._cluster_autoscaler = StreamAutoscaler(executor._cluster_autoscaler, executor)
