"""SIGTERM, with which a machine or a job's manager asks a process to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the sweep as Ctrl-C does: its trials go on from their checkpoints at the next start."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Stopped(SystemExit):
    """A run that a SIGTERM has stopped, with the exit status that a shell gives it."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def set_by_sigterm(event: threading.Event) -> Iterator[None]:
    """SIGTERM, with which a machine or a job's manager asks a process to end, sets the event; a second one ends the process."""
    if threading.current_thread() is not threading.main_thread():  # a trial of a sweep: Ray ends those
        yield
        return

    def handle(number: int, frame: object) -> None:
        if event.is_set():
            raise Stopped
        event.set()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
