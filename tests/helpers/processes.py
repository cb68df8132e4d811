"""Python code in a process of its own, as a user would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence


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
