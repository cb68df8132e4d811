"""Counts what this process reads from S3. Light, so that a process without S3 need not import its client to ask."""

from __future__ import annotations

import threading

_lock = threading.Lock()
_bytes = 0


def count_read(nbytes: int) -> None:
    """Count the body of an answer."""
    global _bytes
    with _lock:
        _bytes += nbytes


def take_read_bytes() -> int:
    """Bytes that were read from S3 since the last call. Each byte is returned once."""
    global _bytes
    with _lock:
        taken, _bytes = _bytes, 0
    return taken
