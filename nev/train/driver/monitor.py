"""A thread in the driver that reads the workers' messages and calls the callbacks.

The driver owns the console and MLflow, so the workers import neither, and SQLite has one writer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nev.cluster.ray_internals import WorkerGroup, kill_worker_group
from nev.common.signals import Stopped, handle_sigterm
from nev.train.driver.early_stopping import EarlyStopping
from nev.train.driver.metrics import MetricsCallback, MetricsLogger
from nev.train.driver.step_progress import StepProgress
from nev.train.driver.validator import Validator
from nev.train.messages import CheckpointSaved, Failed, Left, Message, Metrics, Note, ProfileSaved, Started

POLL_S = 0.5
RELAY_S = 0.2
FLUSH_S = 5.0  # to MLflow: every call to a SQLite store costs CPU that training on one machine would miss


class TrainMonitor:
    """What the driver knows of the workers.

    errors: why the run cannot go on, as workers have reported it.
    workers_left: the workers saved a checkpoint and exited early (preemption, or a stop request).
    stop_requested: set by SIGTERM; the workers then save a checkpoint and exit.
    early_stopped: set when validations stop improving; the workers then save a checkpoint and exit.
    ended_by_callback: a callback has raised SystemExit (Tune ends a trial so); workers that still ran were killed.
    """

    def __init__(
        self,
        mailbox: Any,
        logger: MetricsLogger,
        callbacks: Sequence[MetricsCallback],
        early_stopping: EarlyStopping,
        progress: StepProgress,
        validator: Validator | None = None,
        observers: Sequence[Callable[[Message], None]] = (),
    ) -> None:
        self.errors: list[str] = []
        self.workers_left = False
        self.ended_by_callback = False
        self.stop_requested = threading.Event()
        self.early_stopped = threading.Event()
        self._mailbox, self._logger, self._progress = mailbox, logger, progress
        self._callbacks, self._observers = callbacks, observers
        self._early_stopping, self._validator = early_stopping, validator
        self._group: WorkerGroup | None = None
        self._started = False
        self._flushed = 0.0
        self._polling = threading.Lock()

    def poll(self) -> None:
        """Handle the messages, and the validations beside training, since the last call."""
        import ray

        with self._polling:
            for message in ray.get(self._mailbox.take.remote()):
                self._handle(message)
            self._log_validations()
            if self._early_stopping.should_stop and not self.early_stopped.is_set():
                self._logger.warn(f"{self._early_stopping}. The run ends here.")
                self.early_stopped.set()
            if time.monotonic() - self._flushed > FLUSH_S:
                self._flush()

    def show_wait(self, text: str) -> None:
        """Show what the run waits for before its workers start; "" when they start."""
        self._progress.show_wait(text)

    def ends(self) -> bool:
        """Whether the run ends: a stop was requested, validations stopped improving, or a callback has ended it."""
        return self.stop_requested.is_set() or self.early_stopped.is_set() or self.ended_by_callback

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._logger.warn(text)

    def _handle(self, message: Message) -> None:
        for observe in self._observers:
            observe(message)
        match message:
            case Metrics(step, metrics):
                self._log(step, metrics)
                self._progress.show(step)
            case Note(text):
                self._logger.warn(text)
            case CheckpointSaved(step):
                if self._validator:
                    self._validator.add(step)
                self._log(step, message.metrics)
            case ProfileSaved(step, location):
                self._logger.save_trace(step, location)
            case Started(step, group):
                if self._started:
                    self._logger.warn(f"the processes were started again; training continues from step {step}")
                self._started, self.workers_left, self._group = True, False, group
            case Left(step):
                self._warn_left(step)
                self.workers_left, self._group = True, None
            case Failed(error):
                self.errors.append(error)

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        """Call every callback. A callback that ends the process (Tune does, in a trial) ends the workers first."""
        self._progress.update(metrics)
        try:
            for callback in self._callbacks:
                callback(step, metrics)
        except SystemExit as end:
            self.ended_by_callback = True
            if self._group:
                kill_worker_group(self._group)
            raise Stopped from end

    def _log_validations(self) -> None:
        for step, metrics, problem in self._validator.take_outcomes() if self._validator else []:
            if problem:
                self._logger.warn(problem)
            self._log(step, metrics)

    def _warn_left(self, step: int) -> None:
        if self.early_stopped.is_set():
            return
        if self.stop_requested.is_set():
            self._logger.warn(f"step {step}: a checkpoint is saved, and the same command continues from it")
        else:
            self._logger.warn(
                f"step {step}: a machine is taken away; a checkpoint is saved, and training continues where there is room"
            )

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        self._logger.flush()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Poll in a thread while the body runs, and once more at its end. Another thread relays stop requests."""
        import ray

        over = threading.Event()

        def poll() -> None:
            while not over.wait(POLL_S):
                self.poll()

        def relay() -> None:  # a thread of its own: an MLflow server that hangs must not delay a stop
            while not over.wait(RELAY_S):
                if self.stop_requested.is_set() or self.early_stopped.is_set():
                    if self.stop_requested.is_set() and self._group:
                        self._logger.warn(
                            "stop requested: the current step is finished, and a checkpoint of it is saved"
                        )
                    ray.get(self._mailbox.request_stop.remote())
                    return

        threads = [threading.Thread(target=target, name="nev-monitor", daemon=True) for target in (poll, relay)]
        self._progress.start()
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()
            self._group = None  # a handle of the controller would keep its process
            self.poll()
            self._flush()
            self._progress.stop()

    def wait_for_validation(self) -> None:
        """Wait until every checkpoint is validated. Raises Stopped on SIGTERM."""
        if not self._validator:
            return
        with handle_sigterm():
            finished = False
            while not finished:
                finished = self._validator.finished(POLL_S)
                self._log_validations()
