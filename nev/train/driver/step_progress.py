"""The line on the console that shows how far training is, and its newest numbers."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from nev.common.progress import throttle

SHOWN = {
    "loss": "loss {:.4f}",
    "images_per_s": "{:,.0f} images/s",
    "data_wait_share": "data wait {:.0%}",
    "zero_shot/top1": "top-1 {:.1%}",
    "retrieval/text_to_image/r10": "t→i R@10 {:.1%}",
}


class StepProgress:
    """A bar on a terminal; elsewhere a line now and then, and the last line in any case."""

    def __init__(self, console: Console, total_steps: int, start_step: int) -> None:
        self._console, self._total = console, total_steps
        self._bar = make_bar(console)
        self._task = self._bar.add_task("", total=total_steps, completed=start_step, numbers="starting")
        self._latest: dict[str, float] = {}
        self._line = self._printed = ""
        self._print_seldom = throttle(self._print)

    def start(self) -> None:
        """Draw the bar, on a terminal."""
        if self._console.is_terminal:
            self._bar.start()

    def update(self, metrics: dict[str, float]) -> None:
        """Take the newest value of each metric."""
        self._latest.update(metrics)

    def show(self, step: int) -> None:
        """Draw the line of a step, with the newest value of each metric."""
        numbers = "  ".join(text.format(self._latest[key]) for key, text in SHOWN.items() if key in self._latest)
        self._bar.update(self._task, completed=step, numbers=numbers)
        self._line = f"step {step}/{self._total}  {numbers}"
        if not self._console.is_terminal:
            self._print_seldom(self._line)

    def show_wait(self, text: str) -> None:
        """Draw a line about a time without steps; "" when that time is over."""
        self._bar.update(self._task, numbers=text or "starting")
        if text and not self._console.is_terminal:
            self._line = text
            self._print_seldom(text)

    def stop(self) -> None:
        """Remove the bar; without a terminal, print the last line unless it stands there."""
        if self._console.is_terminal:
            self._bar.stop()
        elif self._printed != self._line:
            self._print(self._line)

    def _print(self, line: str) -> None:
        self._printed = line
        self._console.print(line, highlight=False, soft_wrap=True)


def make_bar(console: Console) -> Progress:
    """The bar of a training. A narrow terminal cuts the numbers, which stand last."""
    return Progress(
        BarColumn(10),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("steps  ETA", table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[numbers]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        console=console,
        transient=True,
        expand=True,
    )
