"""Ray's start beside the driver's own work: while the driver reads and checks its inputs, Ray and the first processes start."""

from __future__ import annotations

import threading
from contextlib import suppress

from nev.cluster.session import connect, count_cpus
from nev.common.imports import import_uninterrupted

TASK_PROCESSES = 4
# Ray gives a process to tasks of one environment alone, and takes an environment that it has merged for another one. Ray Train
# adds this variable to the environment of its tasks; nev gives all processes that value (`nev.common.quiet`).
TRAIN_ENVIRONMENT = {"env_vars": {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"}}


def begin_to_connect() -> None:
    """Connect in a thread, and start processes there that a run needs first. A later call of `connect` waits for the thread.

    Where this process is connected already, nothing happens.
    """
    import ray

    if ray.is_initialized():
        return
    threading.Thread(target=_connect_and_stay, name="nev-ray", daemon=True).start()


def _connect_and_stay() -> None:
    with suppress(Exception):  # the driver's own call of `connect` meets the same error, and raises it
        connect()
        start_task_processes()
        start_actors()
    threading.Event().wait()  # Linux ends Ray's processes with the thread that has started them


def start_task_processes() -> None:
    """Start processes that import what the tasks of a stream need, some seconds' work. Returns at once.

    Ray keeps as many idle processes on a node as it has CPUs. These tasks reserve nothing, so no node is started for them.
    """
    import ray

    @ray.remote(num_cpus=0, runtime_env=TRAIN_ENVIRONMENT)
    def import_stream() -> None:
        import_uninterrupted("nev.data.stream")
        import_uninterrupted("torch")

    for _ in range(min(count_cpus(), TASK_PROCESSES)):
        import_stream.remote()


def start_actors() -> None:
    """Start the actors that all streams of a cluster share: one divides the cluster, one counts. Returns at once."""
    from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
    from ray.data._internal.stats import get_or_create_stats_actor

    get_or_create_autoscaling_coordinator()  # type: ignore[no-untyped-call]
    get_or_create_stats_actor()
