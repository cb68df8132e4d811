"""SIGTERM, with which a machine or a job's manager asks a process to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(SystemExit):
    """SIGTERM has ended the run. The exit status is the one that a shell gives: 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def handle_sigterm(stop_requested: threading.Event | None = None) -> Iterator[None]:
    """Within the body, the first SIGTERM sets `stop_requested`; the next SIGTERM raises Stopped.

    stop_requested: None makes the first SIGTERM raise Stopped.
    Outside the main thread the context does nothing: Python has signal handlers in the main thread alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        if stop_requested is None or stop_requested.is_set():
            raise Stopped
        stop_requested.set()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: a handler that Python does not know
