"""Imports in processes that may be interrupted at any moment, and actions that wait for the import of a library."""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from types import ModuleType


@functools.cache
def import_uninterrupted(module: str) -> None:
    """Import a module in a separate thread, so that an exception in the calling thread does not break off the import.

    Ray cancels a task by an exception in its main thread, and gives the process more tasks afterwards. If the exception hits
    `import torch`, torch cannot be imported in that process again, and every later task fails (torch 2.15, Ray 2.60).
    """
    with ThreadPoolExecutor(1) as pool:
        pool.submit(importlib.import_module, module).result()


def when_imported(module: str, action: Callable[[], object]) -> None:
    """Call `action` once after `module` is imported, by whomever: now, where it is imported already."""
    if module in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Waiting(module, action))


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds one module as Python would, and lets its loader call the action afterwards."""

    def __init__(self, module: str, action: Callable[[], object]) -> None:
        self.module, self.action = module, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:  # a look at the module is no import yet
            sys.meta_path.insert(0, self)
        if spec and spec.loader:
            spec.loader = _ThenCall(spec.loader, self)
        return spec


class _ThenCall(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, waiting: _Waiting) -> None:
        self.loader, self.waiting = loader, waiting

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if self.waiting in sys.meta_path:
            sys.meta_path.remove(self.waiting)
            self.waiting.action()

    def __getattr__(self, name: str) -> object:  # resources and sources are the real loader's affair
        return getattr(self.loader, name)
