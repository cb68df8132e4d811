"""A function in a process of its own, where no other library runs threads."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def run_in_fresh_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function of a module in a new interpreter; its result comes back, or its error is raised here.

    For tests that use tracemalloc: starting and stopping the tracer while native threads of Ray run can crash
    CPython 3.11 (https://github.com/python/cpython/issues/128679).
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()
