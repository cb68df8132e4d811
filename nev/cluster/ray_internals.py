"""What Ray has no public way to (2.60): the private names of Ray and Ray Train are used in this file alone.

Those of Ray Data are in `nev.cluster.backpressure`, since every process of a run imports this file, and Ray Data takes a second.
"""

from __future__ import annotations

import logging
import re
import threading
import warnings
from typing import Any, NamedTuple

from nev.common.errors import NevError


def quiet_worker_deaths() -> None:
    """Of every process or node that dies, a driver prints pages (Ray 2.60, `log_to_driver` or not). Ray's logs have them, too."""
    import ray._private.worker as driver

    driver.print_to_stdstream = lambda data, ignore_prefix: logging.getLogger("ray").debug("%s", data.get("lines"))


def quiet_data_logger() -> None:
    """Ray Data's logger writes INFO to the console by a handler of its own; its log file keeps everything."""
    import ray.data  # it gives its logger that handler when it is imported: later, it would speak up again

    # Ray 2.60 has no other way to bound a task's retries (`max_retries`), and says that this one will go.
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    for handler in logging.getLogger(ray.data.__name__).handlers:
        if handler.name == "console":
            handler.setLevel(logging.ERROR)


class WorkerGroup(NamedTuple):
    """The workers that train now: the actor of Ray Train that starts them again when they die, and their placement group."""

    controller: Any
    placement_group: Any


OUT_OF_MEMORY = (
    "a process of this run was ended because its machine's memory was full. Lower train.micro_batch (`nev "
    "capacity` computes what a worker takes), or let less else run there. The same command goes on from the latest checkpoint."
)


RAISED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)(: |$)")


def remove_leaked_placement_groups() -> None:
    """Give back the room of workers that did not start. Ray 2.60 forgets the placement group of workers of which one died then.

    Called when no worker of this job runs. Nothing is done in a trial of a sweep, whose job has the groups of others, too.
    """
    import ray
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    if threading.current_thread() is not threading.main_thread():
        return
    job = ray.get_runtime_context().get_job_id()
    for name, group in placement_group_table().items():
        if name.endswith(job) and group["state"] != "REMOVED":  # a group's id ends with its job's
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


def kill_worker_group(group: WorkerGroup) -> None:
    """End workers whose driver is about to be ended. Ray 2.60 keeps the room of a controller that dies so until the job ends."""
    import ray
    from ray.util import remove_placement_group

    ray.kill(group.controller)  # first: it would start the workers again
    if group.placement_group:
        remove_placement_group(group.placement_group)


def startup_timed_out(error: Any) -> bool:
    """Whether a ray.train.ControllerError says that there was no room for the workers for a while."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(error.controller_failure, WorkerGroupStartupTimeoutError)


def first_cause(error: BaseException) -> str:
    """The message of a failure that went through Ray: nev's own, else the innermost."""
    inner = innermost(error)
    said = str(inner).strip() or repr(inner)
    if (
        not isinstance(inner, NevError) and "out of memory issue" in said
    ):  # Ray's words, of which the first say nothing else
        return OUT_OF_MEMORY
    if isinstance(inner, NevError):
        return f"{type(inner).__name__}: {said}"
    # Of errors in tasks of tasks there is only the text: the first one in it is the cause of the others.
    raised = [line for line in said.splitlines() if RAISED.match(line) and not line.startswith("ray.")]
    return raised[0] if raised else f"{type(inner).__name__}: {said.splitlines()[-1]}"


def innermost(error: BaseException) -> BaseException:
    """The first cause of a failure that went through Ray, or nev's own error on the way to it."""
    failures = getattr(error, "worker_failures", None)
    inner = next(iter(failures.values())) if failures else getattr(error, "controller_failure", error)
    while not isinstance(inner, NevError) and (deeper := getattr(inner, "cause", None) or inner.__cause__) is not None:
        inner = deeper
    return inner


def current_worker_group() -> WorkerGroup:
    """The workers that this one is of."""
    from ray.train.v2._internal.execution.context import get_train_context
    from ray.util import get_current_placement_group

    return WorkerGroup(get_train_context().controller_actor, get_current_placement_group())


def preemption_pending() -> bool:
    """Whether this process was told that a machine of the run will be taken away.

    Ray's public `get_preemption_info` would have all ranks meet in an actor; here they agree by a byte after each step.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None
