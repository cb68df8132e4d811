"""The private names of Ray and Ray Train (2.60), for what has no public API. No other file uses them.

Every process of a run imports this file, and Ray Data takes a second to import: the private names of Ray Data are in
`nev.cluster.backpressure`, `nev.cluster.decoders` and `nev.cluster.warm_up`.
"""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from nev.common.errors import NevError


def quiet_worker_deaths() -> None:
    """Keep the driver from printing pages for every process or node that dies (even with `log_to_driver=False`).

    Ray's logs have the same text.
    """
    import ray._private.worker as driver

    driver.print_to_stdstream = lambda data, ignore_prefix: logging.getLogger("ray").debug("%s", data.get("lines"))


def quiet_data_logger() -> None:
    """Keep Ray Data from logging INFO to the console by a handler of its own. Its log file has everything."""
    import ray.data  # the import sets up that handler, so it must come first

    # Ray 2.60 warns that this argument will be removed, but has no other way to limit the retries of a task (`max_retries`).
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    for handler in logging.getLogger(ray.data.__name__).handlers:
        if handler.name == "console":
            handler.setLevel(logging.ERROR)


class WorkerGroup(NamedTuple):
    """The workers that train now.

    controller: the actor of Ray Train that restarts workers.
    placement_group: the resources of the workers.
    """

    controller: Any
    placement_group: Any


class NodeRequests(NamedTuple):
    """What the cluster's autoscaler says of nodes that are not there.

    coming: node types with the number of nodes that start now.
    failed: node types that could not be started, with the reason of the cloud.
    impossible: whether no node type has room for any of the placement groups in question.
    autoscaler: whether an autoscaler of version 2 has started a node of this cluster, or says that it cannot.
    """

    coming: dict[str, int]
    failed: dict[str, str]
    impossible: bool
    autoscaler: bool


def read_node_requests(placement_groups: Sequence[str]) -> NodeRequests:
    """Ask the autoscaler (version 2) of the connected cluster.

    placement_groups: their ids, in hex. Where the head does not answer, nothing comes, nothing fails and nothing is impossible.
    """
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]

    reply = GetClusterStatusReply()
    try:
        reply.ParseFromString(GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=10))
    except ray.exceptions.RpcError:  # a busy head; who waits will ask again
        return NodeRequests({}, {}, impossible=False, autoscaler=True)
    state = reply.autoscaling_state
    coming: Counter[str] = Counter()
    for request in state.pending_instance_requests:
        coming[request.ray_node_type_name] += request.count
    for node in state.pending_instances:
        coming[node.ray_node_type_name] += 1
    failed = {request.ray_node_type_name: request.reason for request in state.failed_instance_requests}
    details = [request.details for request in state.infeasible_gang_resource_requests]
    impossible = all(any(group in text for text in details) for group in placement_groups)
    return NodeRequests(dict(coming), failed, impossible, state.autoscaler_state_version > 0)


OUT_OF_MEMORY_MESSAGE = (
    "a process of this run was killed because the memory of its machine was full. Lower train.micro_batch (`nev "
    "capacity` computes the memory of a worker), or run fewer other programs there. The same command continues from the latest "
    "checkpoint."
)


RAISED_LINE = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)(: |$)")


def remove_leaked_placement_groups() -> None:
    """Remove the placement groups of workers that did not start. Ray 2.60 leaks the group if a worker dies at its start.

    Call this when no worker of this job runs. In a trial of a sweep this does nothing: the job has groups of other trials too.
    """
    import ray
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    if threading.current_thread() is not threading.main_thread():
        return
    job = ray.get_runtime_context().get_job_id()
    for name, group in placement_group_table().items():
        if name.endswith(job) and group["state"] != "REMOVED":  # the id of a group ends with the id of its job
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


def kill_worker_group(group: WorkerGroup) -> None:
    """Kill the workers of a driver that is about to exit. Otherwise Ray 2.60 holds their resources until the job ends."""
    import ray
    from ray.util import remove_placement_group

    ray.kill(group.controller)  # first, because the controller would restart the workers
    if group.placement_group:
        remove_placement_group(group.placement_group)


def startup_timed_out(error: Any) -> bool:
    """Whether a ray.train.ControllerError means that the cluster had no room for the workers within the time limit."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(error.controller_failure, WorkerGroupStartupTimeoutError)


def first_cause(error: BaseException) -> str:
    """The message of the first cause of an error that Ray has passed on (`find_root_error`)."""
    root = find_root_error(error)
    message = str(root).strip() or repr(root)
    if isinstance(root, NevError):
        return f"{type(root).__name__}: {message}"
    if "out of memory issue" in message:  # Ray's words for a process that its memory monitor has killed
        return OUT_OF_MEMORY_MESSAGE
    # An error in a task of a task has only a text. The first error in the text is the cause of the later ones.
    raised = [line for line in message.splitlines() if RAISED_LINE.match(line) and not line.startswith("ray.")]
    return raised[0] if raised else f"{type(root).__name__}: {message.splitlines()[-1]}"


def find_root_error(error: BaseException) -> BaseException:
    """The first NevError in the chain of causes of an error that Ray has passed on, or else the last error in the chain."""
    failures = getattr(error, "worker_failures", None)
    root = next(iter(failures.values())) if failures else getattr(error, "controller_failure", error)
    while not isinstance(root, NevError) and (cause := getattr(root, "cause", None) or root.__cause__) is not None:
        root = cause
    return root


def current_worker_group() -> WorkerGroup:
    """The worker group of this process, which is one of the workers."""
    from ray.train.v2._internal.execution.context import get_train_context
    from ray.util import get_current_placement_group

    return WorkerGroup(get_train_context().controller_actor, get_current_placement_group())


def call_in_workers(function: Callable[[], None]) -> Any:
    """Make a callback of Ray Train, by which every worker calls `function` before anything else of the training."""
    from ray.train.v2._internal.execution.callback import WorkerCallback

    class CallFirst(WorkerCallback):
        def after_init_train_context(self) -> None:
            function()

    return CallFirst()


def current_loop_config() -> dict[str, Any]:
    """The `train_loop_config` of Ray's trainer, in a worker."""
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().train_run_context.train_loop_config or {}


def controller_environment() -> dict[str, str]:
    """The variables that Ray Train gives its controller beside those of the job."""
    from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR as WARN
    from ray.train.v2._internal.constants import DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE as DEFAULT
    from ray.train.v2._internal.constants import get_env_vars_to_propagate

    return {WARN: DEFAULT} | get_env_vars_to_propagate()


def preemption_pending() -> bool:
    """Whether this process has been notified that a machine of the run will be preempted.

    Ray's public `get_preemption_info` would synchronise all ranks in an actor; nev's ranks exchange a byte after each step.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None
