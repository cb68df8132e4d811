"""A bar on stderr while a long list is embedded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

LONG = 512  # so many items, or more, have a bar on a terminal


def count_items(items: Iterable[Any]) -> int | None:
    """How many items there are; None for a generator."""
    try:
        return len(items)  # type: ignore[arg-type]
    except TypeError:
        return None


@contextmanager
def show_progress(what: str, total: int | None, wanted: bool | None) -> Iterator[Callable[[int], object]]:
    """Yield a function that advances a bar on stderr, if there is to be one."""
    from tqdm.auto import tqdm

    show = wanted if wanted is not None else (total is None or total >= LONG) and sys.stderr.isatty()
    with tqdm(total=total, unit=f" {what}", disable=not show, leave=False) as bar:
        yield bar.update
