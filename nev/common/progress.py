"""Progress of a command: live lines on a terminal, and a new line every 15 seconds in a log, which cannot redraw lines."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_LINE_S = 15.0

# (name of the work, units done, units in all, further text)
ProgressCallback = Callable[[str, int, int, str], None]


@contextmanager
def progress(console: Console) -> Iterator[ProgressCallback]:
    """Yield a function that shows the progress of named work, one line a name. Finished work may start again from 0."""
    if console.is_terminal:
        bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(20),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}  {task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
        )
        tasks: dict[str, TaskID] = {}

        def show(name: str, done: int, total: int, text: str) -> None:
            if name not in tasks or (done == 0 and bars.tasks[tasks[name]].finished):
                tasks[name] = bars.add_task(name, total=total, text=text)
            bars.update(tasks[name], completed=done, total=total, text=text)

        with bars:
            yield show
    else:

        def print_line(text: str) -> None:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

        lines: defaultdict[str, Callable[[str], None]] = defaultdict(lambda: throttle(print_line))

        def show_line(name: str, done: int, total: int, text: str) -> None:
            show = print_line if done == total else lines[name]
            show(f"{name.strip()} {done:,}/{total:,}  {text}")

        yield show_line


@contextmanager
def count_progress(console: Console, what: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that adds to a count of `what`, for work whose total is not known. The count and its rate are shown."""
    start, total = time.monotonic(), 0

    def print_line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    def summary() -> str:
        return f"{total:,} {what}, {total / max(time.monotonic() - start, 1e-9):,.0f}/s"

    with console.status("") as status:
        show = status.update if console.is_terminal else throttle(print_line)

        def add(count: int) -> None:
            nonlocal total
            total += count
            show(summary())

        yield add
    if total:
        print_line(summary())


def throttle(show: Callable[[str], None], seconds: float = PLAIN_LINE_S) -> Callable[[str], None]:
    """Wrap `show` so that it is called at most once in `seconds`. Lines in between are dropped."""
    last = -seconds

    def show_throttled(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            show(line)

    return show_throttled
