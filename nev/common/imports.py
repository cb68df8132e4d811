"""Imports in processes that may be interrupted at any moment."""

from __future__ import annotations

import functools
import importlib
from concurrent.futures import ThreadPoolExecutor


@functools.cache
def import_uninterrupted(module: str) -> None:
    """Import a module in a separate thread, so that an exception in the calling thread does not break off the import.

    Ray cancels a task by an exception in its main thread, and gives the process more tasks afterwards. If the exception hits
    `import torch`, torch cannot be imported in that process again, and every later task fails (torch 2.15, Ray 2.60).
    """
    with ThreadPoolExecutor(1) as pool:
        pool.submit(importlib.import_module, module).result()
