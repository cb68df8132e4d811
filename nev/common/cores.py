"""The cores of a process."""

from __future__ import annotations

import os


def count_cores() -> int:
    """The cores that this process may use: those of taskset or of a container's cpuset, and not all of the machine."""
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    return len(affinity(0)) if affinity else os.cpu_count() or 1
