"""A process of its own for every measurement, so that no contestant runs beside the threads or the memory of another."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from nev.common.errors import NevError

REPOSITORY = Path(__file__).parents[2]
WARM_UP = 0.2  # the share of steps, the first ones, that no rate counts
SETTINGS_OF_OTHERS = (
    "RAY_ADDRESS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
)  # the measured machine is this one, all of it

P = ParamSpec("P")
T = TypeVar("T")


class BenchmarkFailed(NevError, RuntimeError):
    """A contestant did not finish. The message is the end of what it printed."""


def warm_up_steps(steps: int) -> int:
    """How many of `steps` a rate leaves out: a fifth, and one at least."""
    return max(1, int(WARM_UP * steps))


def in_own_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function` in a fresh interpreter and return its result."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def run_script(script: str, *args: str) -> str:
    """Run a script of the repository with this interpreter. Returns what it printed. Raises BenchmarkFailed."""
    command = [sys.executable, str(REPOSITORY / script), *args]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkFailed(f"{script} ended with {done.returncode}:\n{_end(done.stdout + done.stderr)}")
    return done.stdout


@contextmanager
def lines_of_module(module: str, args: list[str], cwd: Path) -> Iterator[Iterator[str]]:
    """The lines that `python -m module` prints, as they come; the process is ended when the body is left.

    Raises BenchmarkFailed if the process fails before that.
    """
    seen: list[str] = []
    process = subprocess.Popen(
        [sys.executable, "-m", module, *args],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout

    def lines() -> Iterator[str]:
        for line in process.stdout or ():
            seen.append(line)
            yield line
        if process.wait():
            raise BenchmarkFailed(f"{module} ended with {process.returncode}:\n{_end(''.join(seen))}")

    try:
        yield lines()
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def environment() -> dict[str, str]:
    """This process's environment without what would send a contestant elsewhere or take cores from it."""
    kept = {key: value for key, value in os.environ.items() if key not in SETTINGS_OF_OTHERS}
    return {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false", **kept}


def _end(output: str, lines: int = 25) -> str:
    return "\n".join(output.strip().splitlines()[-lines:])


def wait_for(what: Callable[[], Any], seconds: float, name: str) -> Any:
    """The first true answer of `what`; an error with `name` in it where none comes in time."""
    end = time.monotonic() + seconds
    while not (found := what()):
        if time.monotonic() > end:
            raise TimeoutError(f"{name}: not within {seconds:g} s")
        time.sleep(0.05)
    return found
