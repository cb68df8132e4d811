"""How far a command is: live lines on a terminal, and now and then a new line where none can be redrawn, as in a job's log."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_LINE_S = 15.0

# (name of the work, done, in all, what else there is to say)
ProgressCallback = Callable[[str, int, int, str], None]


@contextmanager
def progress(console: Console) -> Iterator[ProgressCallback]:
    """Yield a function that shows how far some work is, a line for each name. Work that is done may begin anew."""
    if console.is_terminal:
        bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(20),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}  {task.fields[said]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
        )
        tasks: dict[str, TaskID] = {}

        def show(name: str, done: int, total: int, said: str) -> None:
            if name not in tasks or (done == 0 and bars.tasks[tasks[name]].finished):
                tasks[name] = bars.add_task(name, total=total, said=said)
            bars.update(tasks[name], completed=done, total=total, said=said)

        with bars:
            yield show
    else:

        def line(text: str) -> None:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

        lines: defaultdict[str, Callable[[str], None]] = defaultdict(lambda: throttle(line))

        def say(name: str, done: int, total: int, said: str) -> None:
            show_it = line if done == total else lines[name]
            show_it(f"{name.strip()} {done:,}/{total:,}  {said}")

        yield say


@contextmanager
def count_progress(console: Console, what: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told how many more of `what` are done, where nobody knows how many there are."""
    began, total = time.monotonic(), 0

    def said() -> str:
        return f"{total:,} {what}, {total / max(time.monotonic() - began, 1e-9):,.0f}/s"

    with console.status("") as status:
        show = status.update if console.is_terminal else throttle(lambda text: console.print(text, highlight=False))

        def more(count: int) -> None:
            nonlocal total
            total += count
            show(said())

        yield more
    if total:
        console.print(said(), highlight=False)


def throttle(show: Callable[[str], None], seconds: float = PLAIN_LINE_S) -> Callable[[str], None]:
    """`show`, but at most once in so many seconds; what comes between is passed over."""
    last = -seconds

    def maybe(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            show(line)

    return maybe
