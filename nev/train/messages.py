"""The messages of workers to the driver, a type for each event, and the mailbox that holds them. No torch, no Ray at import."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from nev.cluster.ray_internals import WorkerGroup
from nev.common.errors import NevError


class Metrics(NamedTuple):
    """Metrics of a step, by name."""

    step: int
    metrics: dict[str, float]


class Note(NamedTuple):
    """A line for the console: a skipped step, storage that refuses a checkpoint."""

    text: str


class CheckpointSaved(NamedTuple):
    """The checkpoint of `step` is complete in storage. write_s: seconds that the write took."""

    step: int
    write_s: float

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the write."""
        return {"checkpoint_write_s": self.write_s}


class ProfileSaved(NamedTuple):
    """A trace of the profiler is complete in storage. step: the first one of the trace."""

    step: int
    location: str


class Failed(NamedTuple):
    """The run cannot go on, and a restart would end the same way. error: the cause, and what to do."""

    error: str


class Started(NamedTuple):
    """A group of workers trains from `step` on. group: the handles with which the driver can kill the workers."""

    step: int
    group: WorkerGroup


class Left(NamedTuple):
    """The workers saved a checkpoint at `step` and exited early (preemption, or a stop request)."""

    step: int


Event = Metrics | Note | CheckpointSaved | ProfileSaved
Message = Event | Failed | Started | Left
Report = Callable[[Event], None]  # what a step, and a write beside the steps, may report


class Mailbox:
    """The actor between rank 0 and the driver: messages one way, the start step and the stop request the other way."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._stop = asyncio.Event()
        self._start_step = 0

    async def post(self, message: Message) -> None:
        """Add a message."""
        self._messages.append(message)

    async def take(self) -> list[Message]:
        """Remove all messages and return them, oldest first."""
        messages, self._messages = self._messages, []
        return messages

    async def set_start_step(self, step: int) -> None:
        """Set the step from which the next workers train: that of a verified checkpoint, 0 for a new run."""
        self._start_step = step

    async def start_step(self) -> int:
        """The step of the latest `set_start_step`."""
        return self._start_step

    async def request_stop(self) -> None:
        """Ask the workers to save a checkpoint and to exit."""
        self._stop.set()

    async def wait_for_stop(self) -> None:
        """Return once `request_stop` was called."""
        await self._stop.wait()


class RunIsBusy(NevError, RuntimeError):
    """Another driver on this cluster trains the same run."""


@contextmanager
def open_mailbox(run: str) -> Iterator[Any]:
    """The handle of a run's Mailbox actor on this node, killed at the end of the body.

    The actor's name is the run's folder. Raises RunIsBusy where another job of this cluster has that actor.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here, name=run, namespace="nev")
    try:
        mailbox: Any = actor.remote()
    except ValueError as error:  # the name is taken
        raise RunIsBusy(
            f"{run}: another job on this cluster trains this run. See `ray job list`; stop that job, or wait for its end."
        ) from error
    try:
        yield mailbox
    finally:
        ray.kill(mailbox)  # another start of this run may need the name at once
