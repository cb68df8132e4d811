"""The letters between driver and workers: what rank 0 posts, and the mailbox that holds it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray

from nev.cluster.ray_internals import WorkerGroup
from nev.common.errors import NevError


class Post(NamedTuple):
    """One message of a training process: metrics of a step, lines for the person, or (`error`) why the run cannot go on.

    left: the processes have ended before the run did, as they were asked to, after a checkpoint of this step: a machine of
    theirs is taken away, or the run is to stop. began: they go on from this step; `group`: and
    are this one.
    """

    step: int
    metrics: dict[str, float]
    error: str | None = None
    notes: tuple[str, ...] = ()
    left: bool = False
    began: bool = False
    group: WorkerGroup | None = None


class Mailbox:
    """The actor that holds what rank 0 has posted until the driver takes it, and the driver's request to stop."""

    def __init__(self) -> None:
        self._posts: list[Post] = []
        self._stop = asyncio.Event()

    async def post(self, post: Post) -> None:
        """Keep a message for the driver."""
        self._posts.append(post)

    async def take(self) -> list[Post]:
        """The messages since the last call, oldest first."""
        posts, self._posts = self._posts, []
        return posts

    async def stop(self) -> None:
        """Ask the workers to stop."""
        self._stop.set()

    async def stopped(self) -> None:
        """Return once `stop` was called."""
        await self._stop.wait()


class RunIsBusy(NevError, RuntimeError):
    """Another driver on this cluster trains the same run."""


def start_mailbox(run: str) -> Any:
    """The run's board, on this node: an actor with `post(Post)` and `take() -> list[Post]`, `stop()`, and `stopped()`, which
    comes back after that. Raises RunIsBusy.
    """
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    board = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here, name=run, namespace="nev")
    try:
        return board.remote()
    except ValueError as error:  # the name is taken
        raise RunIsBusy(
            f"{run}: another job on this cluster trains this run. See `ray job list`; stop that job, or wait for its end."
        ) from error


@contextmanager
def open_mailbox(run: str) -> Iterator[Any]:
    """The run's board, for the body of a `with`. Raises RunIsBusy where another job of this cluster trains the run."""
    import ray

    board = start_mailbox(run)
    try:
        yield board
    finally:
        ray.kill(board)  # its name is the run's: another start of this run may need it at once
