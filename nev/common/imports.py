"""Importing in processes that may be interrupted at any moment."""

from __future__ import annotations

import functools
import importlib
from concurrent.futures import ThreadPoolExecutor


@functools.cache
def import_uninterrupted(module: str) -> None:
    """Import a module in a thread of its own, so that the import comes to its end whatever happens to this one.

    Ray cancels a task by an exception in its main thread, and gives the process more tasks afterwards. Where that broke off
    `import torch`, torch can never be imported there again, and every later task fails (seen with torch 2.15, Ray 2.60).
    """
    with ThreadPoolExecutor(1) as pool:
        pool.submit(importlib.import_module, module).result()
