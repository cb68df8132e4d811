"""Independent items as a Ray Data job: one item a block, one block a task, results as they come.

A task whose worker dies is run again by Ray: tasks leave whole files or none, so nothing is lost by it.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Dataset, ExecutionOptions
from ray.exceptions import RaySystemError, WorkerCrashedError

from nev.common.errors import NevError

DEATHS = 5  # of a task's process before the job ends; by default Ray tries for ever


class TaskDied(NevError, RuntimeError):
    """A task's process dies whenever it is run."""


def ray_run(function: Callable[[Any], Any], items: Sequence[Any], task_bytes: int) -> Iterator[Any]:
    """Run `function` on each of `items`, each in a task of one CPU and `task_bytes` of memory, and yield what they return.

    A NevError that a task raises is raised here, and TaskDied where a task's process dies again and again. Where
    `function` can't be imported by Ray's processes, RuntimeError.
    """
    memory = min(task_bytes, int(max(node["Resources"].get("memory", 0) for node in ray.nodes())))  # type: ignore[no-untyped-call]
    return _results(
        function,
        items,
        lambda rows, source: rows.map(
            functools.partial(_task, source=source), num_cpus=1, memory=memory, max_retries=DEATHS
        ),
    )


def ray_run_on_actors(
    function: Callable[[Any], Any], items: Sequence[Any], count: int, cpus: float, gpus: float
) -> Iterator[Any]:
    """The same on `count` actors of so many CPUs and GPUs, which keep in memory what `function` caches.

    Those that start later, on nodes that an autoscaler brings, join those that are at work. Of a cluster that can have none
    of them this waits for ever.
    """
    pool = ActorPoolStrategy(size=count)
    actor: Any = _Actor  # Ray's types know functions only
    return _results(
        function,
        items,
        lambda rows, source: rows.map(actor, fn_constructor_args=(source,), compute=pool, num_cpus=cpus, num_gpus=gpus),
    )


def _results(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    job: Callable[[Dataset, list[ray.ObjectRef[Any]]], Dataset],
) -> Iterator[Any]:
    if not items:
        return
    packed = [{"item": pickle.dumps(item)} for item in items]
    with DataContext.current(_context()):
        done = job(ray.data.from_items(packed, override_num_blocks=len(packed)), [ray.put(function)])
        finished = 0
        try:
            for row in done.iter_rows():
                failed, result = pickle.loads(row["result"])  # noqa: S301 - it comes from our own tasks
                if failed:
                    raise result
                yield result
                finished += 1
        except WorkerCrashedError as error:
            raise TaskDied(
                f"the process of a task died {DEATHS + 1} times, {finished} of {len(items)} tasks are done. It wants more "
                "memory than there is, or a picture crashes its decoder: Ray's logs tell (worker-*.err, raylet.out). What is "
                "done is kept."
            ) from error


class _Actor:
    def __init__(self, source: list[ray.ObjectRef[Any]]) -> None:
        self._source = source

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return _task(row, self._source)


def _task(row: dict[str, Any], source: list[ray.ObjectRef[Any]]) -> dict[str, Any]:
    # An error of nev's own comes back as a result: Ray would wrap it in others, and print their traces.
    try:
        outcome: tuple[bool, Any] = False, _function(source[0])(pickle.loads(row["item"]))  # noqa: S301 - it comes from our own driver
    except NevError as error:
        outcome = True, error
    except RaySystemError as error:  # the function can't be unpacked: Ray would try that for ever
        outcome = True, RuntimeError(str(error))
    return {"result": pickle.dumps(outcome)}


@functools.lru_cache(maxsize=1)
def _function(reference: ray.ObjectRef[Any]) -> Callable[[Any], Any]:
    """The function, fetched once a process: with it come lists of uids and metadata, mapped from the object store."""
    function: Callable[[Any], Any] = ray.get(reference)
    return function


def _context() -> DataContext:
    """A copy of this process's DataContext without bars, and without an order that would hold results back."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options = ExecutionOptions(preserve_order=False)
    return context
