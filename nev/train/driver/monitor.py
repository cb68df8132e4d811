"""From the training processes to the person: a board that rank 0 posts to, and a thread in the driver that reads it.

The driver owns the console and MLflow, so the training processes import neither, and SQLite has one writer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from nev.common.progress import throttle
from nev.train.driver.metrics import MetricsLogger
from nev.train.driver.validator import Validator

POLL_S = 0.5
RELAY_S = 0.2
SEND_S = 5.0  # to MLflow: every call to a SQLite store costs CPU that training on one machine would miss


class TrainMonitor:
    """What the driver has read from the board: errors, and numbers, which it gives to the ledger.

    stop: set by whoever wants the run to end after the step that is under way, with a checkpoint. enough: set when it has run out
    of patience, and ends so, too.
    """

    def __init__(
        self,
        board: Any,
        ledger: MetricsLogger,
        console: Console,
        validator: Validator | None,
        total_steps: int,
        first_step: int,
    ) -> None:
        self.errors: list[str] = []
        self.left = self._begun = False
        self.stop = threading.Event()
        self.enough = threading.Event()
        self._board = board
        self._ledger = ledger
        self._console = console
        self._validator = validator
        self._total = total_steps
        self._line = _progress(console)
        self._task = self._line.add_task("", total=total_steps, completed=first_step, numbers="starting")
        self._said = self._saying = ""
        self._plain = throttle(self._say)
        self._sent = 0.0
        self._away = False
        self._reading = threading.Lock()

    def read(self) -> None:
        """Take what was posted; show it, log it."""
        with self._reading:
            self._read()

    def _read(self) -> None:
        for post in ray.get(self._board.take.remote()):
            if post.error:
                self.errors.append(post.error)
                continue
            for note in post.notes:
                self._ledger.note(note)
            if post.began and self._begun:
                self._ledger.note(f"the processes were started again; training goes on from step {post.step}")
            if post.left and not self.enough.is_set():
                why = "" if self.stop.is_set() else "a machine is taken away; "
                goes_on = (
                    "the same command goes on from here" if self.stop.is_set() else "it goes on where there is room"
                )
                self._ledger.note(f"step {post.step}: {why}what was done is kept, and {goes_on}")
            if post.began or post.left:
                self._begun, self.left = True, post.left
                self._ledger.group = post.group
                continue
            if "checkpoint_write_s" in post.metrics and self._validator:
                self._validator.written(post.step)
            self._take(post.step, post.metrics)
            self._show(post.step)
        for step, metrics, problem in self._validator.done() if self._validator else []:
            if problem:
                self._ledger.note(problem)
            self._take(step, metrics)
        if time.monotonic() - self._sent > SEND_S:
            self._send()

    def _take(self, step: int, metrics: dict[str, float]) -> None:
        self._ledger.take(step, metrics)
        if self._ledger.patience.should_stop and not self.enough.is_set():
            self._ledger.note(f"step {step}: {self._ledger.patience}. The run ends here.")
            self.enough.set()

    def _show(self, step: int) -> None:
        now = self._ledger.latest
        numbers = "  ".join(
            text.format(now[key])
            for key, text in (
                ("loss", "loss {:.4f}"),
                ("images_per_s", "{:,.0f} images/s"),
                ("data_wait_share", "data wait {:.0%}"),
                ("zero_shot/top1", "top-1 {:.1%}"),
                ("retrieval/text_to_image/r10", "t→i R@10 {:.1%}"),
            )
            if key in now
        )
        self._line.update(self._task, completed=step, numbers=numbers)
        self._saying = f"step {step}/{self._total}  {numbers}"
        if not self._console.is_terminal:
            self._plain(self._saying)

    def _say(self, line: str) -> None:
        self._said = line
        self._console.print(line, highlight=False)

    def _send(self) -> None:
        """A tracker that is away must not stop the training: metrics are kept and sent with a later call."""
        from mlflow.exceptions import MlflowException

        self._sent = time.monotonic()
        try:
            self._ledger.tracker.flush()
            self._away = False
        except (MlflowException, OSError):
            if not self._away:
                self._ledger.note(
                    f"MLflow at {self._ledger.tracker.uri} does not answer; numbers are kept and sent later"
                )
            self._away = True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Read the board in a thread while the body runs, and once more at its end; `stop` goes to it by another thread."""
        over = threading.Event()

        def loop() -> None:
            while not over.wait(POLL_S):
                self.read()

        def relay() -> None:  # a server that hangs must not hold it up
            while not over.wait(RELAY_S):
                if self.stop.is_set() or self.enough.is_set():
                    if self.stop.is_set():
                        self._ledger.note("the run was told to stop: the step that is under way is finished and kept")
                    ray.get(self._board.stop.remote())
                    return

        threads = [threading.Thread(target=target, name="nev-monitor", daemon=True) for target in (loop, relay)]
        if self._console.is_terminal:
            self._line.start()
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()
            self._ledger.group = None  # who holds the handle of a controller keeps its process
            self.read()
            self._send()
            self._line.stop()
            if not self._console.is_terminal and self._said != self._saying:
                self._say(self._saying)


def _progress(console: Console) -> Progress:
    return Progress(
        BarColumn(10),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("steps  ETA", table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        # What a narrow terminal has no room for is cut here, at the end.
        TextColumn("{task.fields[numbers]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        console=console,
        transient=True,
        expand=True,
    )
