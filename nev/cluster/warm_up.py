"""Ray's start beside the driver's own work: while the driver reads and checks its inputs, Ray and the first processes start."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager

from nev.cluster.ray_internals import controller_environment
from nev.cluster.session import connect, count_cpus, may_grow
from nev.common.imports import import_uninterrupted

TASK_PROCESSES = 4


@contextmanager
def connecting() -> Iterator[None]:
    """Connect in a thread while the body runs. Ray is connected at the end, or the error of `connect` is raised.

    After an error of the body the start is waited for, too, so that nothing starts while this process ends.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    connected = Future[None]()
    threading.Thread(target=_connect_and_stay, args=(connected,), name="nev-ray", daemon=True).start()
    try:
        yield
        connected.result()
    finally:
        wait([connected])


def _connect_and_stay(connected: Future[None]) -> None:
    try:
        import ray.data  # noqa: F401 - a second's work, which belongs before the start

        connect()
    except BaseException as error:  # noqa: BLE001 - the main thread raises it
        connected.set_exception(error)
        return
    try:
        if not may_grow():
            start_task_processes()
        start_actors()
        connected.set_result(None)
    except BaseException as error:  # noqa: BLE001
        connected.set_exception(error)
    threading.Event().wait()  # Linux would kill Ray's processes at the end of the thread that has started them


def start_task_processes() -> None:
    """Start processes on this machine that import what the tasks of a stream need, some seconds' work. Returns at once.

    Ray keeps as many idle processes as the machine has CPUs. A process serves tasks of one environment. The tasks of a stream
    have the environment of Ray Train's controller, so these tasks have it, too.
    """
    import ray

    @ray.remote(num_cpus=0, runtime_env={"env_vars": controller_environment()})
    def import_stream() -> None:
        import_uninterrupted("nev.data.stream")
        import_uninterrupted("torch")

    for _ in range(min(count_cpus(), TASK_PROCESSES)):
        import_stream.remote()


def start_actors() -> None:
    """Start the actors that all streams share: the coordinator of resources, and the one of statistics. Returns at once."""
    from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
    from ray.data._internal.stats import get_or_create_stats_actor

    get_or_create_autoscaling_coordinator()  # type: ignore[no-untyped-call]
    get_or_create_stats_actor()
