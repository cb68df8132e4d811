"""Python code in a process of its own, as a user would run it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def run_python(
    code: str, *arguments: object, without: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> str:
    """Run code in a fresh interpreter and return what it prints. Raises AssertionError with its stderr where it fails.

    arguments: `sys.argv[1:]`. without: packages that cannot be imported there. environment: added to this process's.
    """
    blocked = f"import sys\nfor name in {tuple(without)!r}:\n    sys.modules[name] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(what: Callable[[], Any], seconds: float, name: str) -> Any:
    """The first true answer of `what`; an error with `name` in it where none comes in time."""
    end = time.monotonic() + seconds
    while not (found := what()):
        if time.monotonic() > end:
            raise TimeoutError(f"{name}: not within {seconds:g} s")
        time.sleep(0.05)
    return found
