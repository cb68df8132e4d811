"""Nodes that decode come and go with the need of a stream, on a cluster that has or will have such nodes.

Ray Data's autoscaler (2.60) asks for twice the throughput whatever the consumers take, and repeats its last request for ever: no
decoder goes while a run trains. Here a stream asks for the CPUs that its consumers' pace takes, by its own measurement, and
decodes on no more. Its tasks are packed on few nodes, so that the other nodes are idle and go.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import ray
from ray.data import DataContext
from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import STANDARD_RESOURCE_TYPES
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators.task_pool_map_operator import TaskPoolMapOperator
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nev.cluster.backpressure import CPUS_KEY, NUMBER_OPERATORS, blocks_limit, count_ready
from nev.cluster.session import cluster_cpus, may_grow

LABEL = {"nev.io/role": "decoder"}  # of nodes that are there to decode
ELSEWHERE = [{"label_selector": {"nev.io/role": "!decoder"}}]
STEP_BLOCKS_KEY, STREAMS_KEY = "nev.step_blocks", "nev.streams"
# Least time of a window before more, or fewer, CPUs are asked for. The processes of a new node take some seconds to start, and
# what the consumers fetch ahead looks like need.
MORE_S, LESS_S = 20.0, 10.0
STEPS = 2  # whole steps of a window before fewer CPUs are asked for: a step takes its blocks at a time, and then none
SCARCE = (
    0.33  # share of the lookahead, of two steps or more, that is decoded: with less, the consumers soon wait for a step
)
SATURATED = 0.9  # share of the CPUs that decode, or of the blocks that are taken: with more, all are
MARGIN = 1.1  # CPUs for one that the consumers' pace takes
FIRST_S, RENEW_S, EXPIRE_S = 0.5, 5.0, 60.0  # a request is repeated; that of a stream that has died is forgotten


def place_decoding(context: DataContext, step_blocks: int, streams: int = 1) -> dict[str, Any]:
    """Let the stream under `context` ask for what it needs, where nodes are there to decode. Returns Ray's options for its tasks.

    They run on decoders first. On one machine, and on a cluster without decoders, nothing changes.
    step_blocks: blocks of a step.
    streams: of the run, which share the decoders that are there at its start.
    """
    if not (may_grow() and has_decoders()):
        return {}
    context.set_config(STEP_BLOCKS_KEY, step_blocks)
    context.set_config(STREAMS_KEY, streams)
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, AskForNeed]
    # Ray Data's default, SPREAD, is for a cluster whose nodes stay.
    return {"scheduling_strategy": "DEFAULT", "label_selector": LABEL, "fallback_strategy": ELSEWHERE}


def has_decoders() -> bool:
    """Whether nodes have the label `LABEL`, or will have it: the variable `NEV_DECODERS` says so where the head starts."""
    return bool(os.environ.get("NEV_DECODERS") or list_decoders())


def list_decoders() -> list[str]:
    """The ids of the nodes that are there to decode."""
    nodes: list[Any] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["NodeID"] for node in nodes if node["Alive"] and LABEL.items() <= node["Labels"].items()]


def choose_node(decoders: dict[str, int], loads: Mapping[str, int]) -> str | None:
    """The first decoder with a free CPU; None where there is none.

    decoders: id -> CPUs of this stream. loads: id -> tasks of this stream that run there.
    """
    return next((node for node, cpus in decoders.items() if loads.get(node, 0) < cpus), None)


class Window(NamedTuple):
    """What a stream has done since its CPUs were decided.

    seconds: length.
    consumed: blocks that the consumers have taken.
    decoded: blocks that were decoded.
    active: mean number of CPUs that decode.
    ready: mean share of the lookahead that is decoded and waits for a consumer.
    ends: for each step that the consumers have taken whole, the `seconds` at which its last block was taken.
    """

    seconds: float = 0.0
    consumed: int = 0
    decoded: int = 0
    active: float = 0.0
    ready: float = 0.0
    ends: tuple[float, ...] = ()

    def add(self, seconds: float, consumed: int, decoded: int, active: float, ready: float, ended: bool) -> Window:
        """This window and the `seconds` after it, in which a step `ended` or not."""
        total = self.seconds + seconds
        weight = seconds / total if total else 0.0
        return Window(
            total,
            self.consumed + consumed,
            self.decoded + decoded,
            self.active + weight * (active - self.active),
            self.ready + weight * (ready - self.ready),
            (*self.ends, total) if ended else self.ends,
        )


class Share(NamedTuple):
    """CPUs of a stream, by Ray Data's coordinator, which divides the cluster among streams.

    decoders: CPUs by node, of nodes that are there to decode, the oldest first.
    elsewhere: CPUs of other nodes that nothing else has reserved.
    """

    decoders: dict[str, int]
    elsewhere: int


def decide_cpus(cpus: int, share: Share, step_cpu_s: float, window: Window) -> int | None:
    """The CPUs of decoders that a stream asks for from now on; None while `window` is too short to say.

    cpus: so far. As many tasks decode at a time as `cpus` and `share.elsewhere` allow.
    step_cpu_s: time of a CPU for the blocks of a step, in seconds.
    More: where blocks are scarce though all CPUs decode, and the consumers take each block at once, all CPUs are doubled. A node
    that boots, or a process that starts, is waited for.
    Fewer: where blocks are plenty, the consumers' steps decide, with a tenth more; half of the CPUs stay at least, as an
    evaluation may lie in the window.
    """
    tasks, there = cpus + share.elsewhere, sum(share.decoders.values())
    all_decode, scarce = window.active >= SATURATED * tasks, window.ready < SCARCE
    if all_decode and (window.decoded < tasks or there < cpus):
        return None
    if all_decode and scarce:
        starved = window.seconds >= MORE_S and window.consumed >= SATURATED * window.decoded
        return max(cpus + tasks, there) if starved else None
    if window.seconds < LESS_S or len(window.ends) <= STEPS:
        return None
    if scarce:
        return cpus
    need = step_cpu_s * (len(window.ends) - 1) / (window.ends[-1] - window.ends[0])
    enough = min(math.ceil(MARGIN * need), math.ceil(need) + 1) - share.elsewhere
    return min(cpus, max(1, cpus // 2, enough))


def first_cpus(share: Share, streams: int) -> int:
    """The CPUs of decoders that a stream asks for where `share` is what Ray gives the first of the run's `streams`: its part."""
    return math.ceil(sum(share.decoders.values()) / streams)


class StreamAutoscaler(ClusterAutoscaler):
    """Asks the cluster for as many CPUs as a stream needs, in the place of Ray Data's autoscaler.

    replaced: Ray Data's own, which knows the cluster's coordinator.
    executor: of the stream.
    """

    def __init__(self, replaced: Any, executor: Any) -> None:
        self._replaced, self._context, self._topology = replaced, executor._data_context, executor._topology
        self._resource_manager = executor._resource_manager
        self._step_blocks = self._context.get_config(STEP_BLOCKS_KEY)
        maps = (op for op in self._topology if isinstance(op, TaskPoolMapOperator))
        self._decode = next(op for op in maps if not op.name.startswith(NUMBER_OPERATORS))
        self._measured = (time.monotonic(), 0, 0)
        self._window, self._cpu_s, self._blocks, self._asked = Window(), 0.0, 0.0, -math.inf
        self._share, self._node_of_task = Share({}, 0), dict[int, str]()
        self._decode._ray_remote_args_fn = self._place_next_task
        self._context.set_config(CPUS_KEY, 1)
        self._set_cpus(1)

    def try_trigger_scaling(self) -> None:
        """Measure, and ask for more or fewer CPUs. The executor calls this in every turn."""
        self._measure()
        step_cpu_s = self._step_blocks * self._cpu_s / max(1.0, self._blocks)
        cpus = decide_cpus(self._cpus, self._share, step_cpu_s, self._window)
        if cpus is not None:
            self._set_cpus(cpus)
            self._window = Window()
            self._cpu_s, self._blocks = self._cpu_s / 2, self._blocks / 2  # the newest windows count most
        unknown = not (self._share.decoders or self._share.elsewhere)
        if time.monotonic() - self._asked >= (FIRST_S if unknown else RENEW_S):
            self._ask()

    def _set_cpus(self, cpus: int) -> None:
        self._cpus = cpus
        self._asked = -math.inf

    def _ask(self) -> None:
        self._asked = time.monotonic()
        coordinator = self._replaced._autoscaling_coordinator
        first = not self._share.decoders
        self._share = self._read_share(coordinator)
        if first and self._share.decoders:  # its part of those that are there already
            self._cpus = max(self._cpus, first_cpus(self._share, self._context.get_config(STREAMS_KEY)))
        self._context.set_config(CPUS_KEY, self._cpus + self._share.elsewhere)
        coordinator.request_resources(
            [{"CPU": 1}] * self._cpus,
            EXPIRE_S,
            request_remaining=STANDARD_RESOURCE_TYPES,
            label_selectors=[LABEL] * self._cpus,
        )
        # The coordinator looks for new nodes every 20 s, or when it is told to: Ray Data starts no task on a node before.
        coordinator._autoscaling_coordinator.get_reserved_resources.remote(coordinator._requester_id, recompute=True)

    def _read_share(self, coordinator: Any) -> Share:
        mine = {node: int(amounts.get("CPU", 0)) for node, amounts in coordinator.get_reserved_resources().items()}
        decoders = {node: mine[node] for node in list_decoders() if node in mine}
        ordered = {node: decoders[node] for node in [*self._share.decoders, *decoders] if node in decoders}
        return Share(ordered, sum(mine.values()) - sum(decoders.values()))

    def _place_next_task(self) -> dict[str, Any]:
        """Ray's options for the next task: the first decoder with a free CPU.

        Ray itself would give every decoder a task now and then, so that none were ever idle.
        """
        active = self._decode._data_tasks.keys()
        self._node_of_task = {task: node for task, node in self._node_of_task.items() if task in active}
        node = choose_node(self._share.decoders, Counter(self._node_of_task.values()))
        if node is None:
            return {}
        self._node_of_task[self._decode._next_data_task_idx] = node
        # The task goes elsewhere if the node is gone, or if others have its CPUs.
        there = NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)
        return {"scheduling_strategy": there, "label_selector": None, "fallback_strategy": None}

    def _counts(self) -> tuple[int, int]:
        """Blocks that the consumers have taken, and blocks that are decoded, since the start."""
        last = list(self._topology)[-1]
        taken = last.metrics.num_outputs_taken - self._topology[last].total_enqueued_output_blocks()
        # A block may be in neither count for a moment, or in both.
        return max(taken, self._measured[1]), self._decode.metrics.num_task_outputs_generated

    def _count_takeable(self) -> int:
        """Blocks that wait for a consumer, but for those that wait for a block before them."""
        return int(count_ready(self._topology, self._decode) - self._decode.internal_output_queue_num_blocks())

    def _measure(self) -> None:
        before, consumed, decoded = self._measured
        self._measured = (time.monotonic(), *self._counts())
        seconds = self._measured[0] - before
        active = min(self._decode.num_active_tasks(), cluster_cpus())  # further tasks wait for a CPU
        self._cpu_s += seconds * active
        self._blocks += self._measured[2] - decoded
        self._window = self._window.add(
            seconds,
            self._measured[1] - consumed,
            self._measured[2] - decoded,
            active,
            self._count_takeable() / blocks_limit(self._context, self._resource_manager),
            self._measured[1] // self._step_blocks > consumed // self._step_blocks,
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
