"""Independent items as a Ray Data job: one item a block, one block a task, results in the order of completion.

Ray runs a task again whose process has died. So tasks must write complete files or none.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Dataset, ExecutionOptions
from ray.exceptions import RaySystemError, WorkerCrashedError

from nev.common.errors import NevError

MAX_RETRIES = 5  # of a task whose process has died; without a limit Ray tries for ever


class TaskDied(NevError, RuntimeError):
    """The process of a task has died at every try."""


def ray_run(function: Callable[[Any], Any], items: Sequence[Any], task_bytes: int) -> Iterator[Any]:
    """Run `function` on each item in a task of its own, and yield the results as they come.

    task_bytes: memory to reserve for a task. A task also reserves one CPU.
    Raises the NevError of a task, TaskDied where the process of a task dies at every try, and RuntimeError where Ray's processes
    cannot import `function`.
    """
    memory = _task_memory(task_bytes)
    return _results(
        function,
        items,
        lambda rows, source: rows.map(
            functools.partial(_task, source=source), num_cpus=1, memory=memory, max_retries=MAX_RETRIES
        ),
    )


def _task_memory(task_bytes: int) -> int:
    """The memory to reserve for a task: not more than the largest node has."""
    return min(task_bytes, int(max(node["Resources"].get("memory", 0) for node in ray.nodes())))  # type: ignore[no-untyped-call]


def ray_run_streaming(
    function: Callable[[Any], Iterable[Any]],
    items: Sequence[Any],
    task_bytes: int,
    cpus: float = 1,
    gpus: float = 0,
    at_once: int | None = None,
) -> Iterator[Any]:
    """Run a generator function as `ray_run` runs a function. Yields what each task yields, as soon as the task yields it.

    cpus, gpus: resources of a task. at_once: most tasks at a time; None: as many as have room.
    A task whose process has died yields again what it has yielded before.
    """
    # Ray would end a process that has a GPU after each task.
    more: dict[str, Any] = {"max_calls": 0} if gpus else {"memory": _task_memory(task_bytes)}
    context = _context()
    context.target_max_block_size = 1  # all that a task yields would become one block
    return _results(
        function,
        items,
        lambda rows, source: rows.map_batches(
            functools.partial(_streaming_task, source=source),
            batch_size=1,
            num_cpus=cpus,
            num_gpus=gpus,
            concurrency=at_once,
            max_retries=MAX_RETRIES,
            **more,
        ),
        context,
    )


def ray_run_on_actors(
    function: Callable[[Any], Any], items: Sequence[Any], count: int, cpus: float, gpus: float
) -> Iterator[Any]:
    """Run `function` as `ray_run` does, but in `count` actors, which keep the caches of `function` in memory.

    cpus, gpus: resources of an actor.

    Actors that start later, on nodes of an autoscaler, join the work. If the cluster never has room for an actor, this waits for
    ever.
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
    context: DataContext | None = None,
) -> Iterator[Any]:
    if not items:
        return
    packed = [{"item": pickle.dumps(item)} for item in items]
    with DataContext.current(context or _context()):
        results = job(ray.data.from_items(packed, override_num_blocks=len(packed)), [ray.put(function)])
        finished = 0
        try:
            for row in results.iter_rows():
                failed, result = pickle.loads(row["result"])  # noqa: S301 - it comes from our own tasks
                if failed:
                    raise result
                yield result
                finished += 1
        except WorkerCrashedError as error:
            done = "" if context else f", {finished} of {len(items)} tasks are done"
            raise TaskDied(
                f"the process of a task died {MAX_RETRIES + 1} times{done}. It needs more memory than there is, or a picture "
                "crashes its decoder: see Ray's logs (worker-*.err, raylet.out). Finished parts are not done again."
            ) from error


class _Actor:
    def __init__(self, source: list[ray.ObjectRef[Any]]) -> None:
        self._source = source

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return _task(row, self._source)


def _task(row: dict[str, Any], source: list[ray.ObjectRef[Any]]) -> dict[str, Any]:
    # A NevError is returned as a result: Ray would wrap it in other errors, and print their tracebacks.
    try:
        outcome: tuple[bool, Any] = False, _function(source[0])(pickle.loads(row["item"]))  # noqa: S301 - it comes from our own driver
    except NevError as error:
        outcome = True, error
    except RaySystemError as error:  # the function cannot be unpickled: Ray would try for ever
        outcome = True, RuntimeError(str(error))
    return {"result": pickle.dumps(outcome)}


def _streaming_task(batch: Any, source: list[ray.ObjectRef[Any]]) -> Iterator[dict[str, Any]]:
    def outcomes() -> Iterator[tuple[bool, Any]]:
        try:
            for result in _function(source[0])(pickle.loads(batch["item"][0])):  # noqa: S301 - it comes from our own driver
                yield False, result
        except NevError as error:
            yield True, error
        except RaySystemError as error:
            yield True, RuntimeError(str(error))

    for outcome in outcomes():
        yield {"result": np.array([pickle.dumps(outcome)], object)}


@functools.lru_cache(maxsize=1)
def _function(reference: ray.ObjectRef[Any]) -> Callable[[Any], Any]:
    """The function, loaded once per process, with its lists of uids and metadata, which are mapped from the object store."""
    function: Callable[[Any], Any] = ray.get(reference)
    return function


def _context() -> DataContext:
    """A copy of this process's DataContext, without progress bars, and without `preserve_order`, which would delay results."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options = ExecutionOptions(preserve_order=False)
    return context
