"""A small disk of a run's own, to be filled."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIZE = 2**28


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A new file system of 256 MiB at `folder`, which is made. False, and a plain folder, where this user may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "nev-test", str(folder)]
    mounted = os.getuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def is_small(folder: Path) -> bool:
    """Whether a folder is on such a disk."""
    return shutil.disk_usage(folder).total <= SIZE
