"""How far a command is, on a terminal and in a log."""

import io
import re

import pytest
from rich.console import Console

from nev.common import progress as module
from nev.common.progress import count_progress, progress, throttle
from nev.train.driver.step_progress import make_bar


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), width=40)
    with progress(console) as tell:
        for done in range(40):
            tell("shards [read]", done, 4000, f"{done * 1000:,} rows of a long line that no width may break")
            clock[0] += 1
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        f"shards [read] {done}/4,000  {done * 1000:,} rows of a long line that no width may break"
        for done in (0, 15, 30)
    ]


def test_a_log_gets_the_end_of_each_work_whenever_it_comes() -> None:
    console = Console(file=io.StringIO(), width=40)
    with progress(console) as tell:
        for name in ("read   ", "written"):
            for done in range(4):
                tell(name, done, 3, "")
    assert [line.strip() for line in console.file.getvalue().splitlines()] == [  # type: ignore[attr-defined]
        "read 0/3",
        "read 3/3",
        "written 0/3",
        "written 3/3",
    ]


def test_a_terminal_gets_a_bar_for_each_name_and_a_new_one_for_work_that_begins_anew() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with progress(console) as tell:
        tell("read", 0, 2, "")
        tell("read", 2, 2, "two")
        tell("read", 0, 3, "")
        tell("read", 1, 3, "one of three")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    last = [line for line in shown.replace("\r", "\n").splitlines() if line.startswith("read")][-2:]
    assert "2/2  two" in last[0]
    assert "1/3  one of three" in last[1]


def test_work_that_is_told_before_its_first_piece_is_done_has_one_bar() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, _environ={})
    with progress(console) as tell:
        for count in range(5):
            tell("shards embedded", 0, 2, f"{count} captions")
        tell("shards embedded", 1, 2, "9 captions")
        shown = "".join(line for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]
    assert "9 captions" in console.file.getvalue() + shown  # type: ignore[attr-defined]
    assert "\x1b[1A" not in console.file.getvalue(), "one row: the cursor never goes up"  # type: ignore[attr-defined]


def test_a_narrow_terminal_keeps_the_step_the_time_left_and_the_loss() -> None:
    console = Console(file=io.StringIO(), width=80)
    line = make_bar(console)
    line.add_task(
        "", total=70829, completed=30000, numbers="loss 5.0382  95 images/s  data wait 0%  top-1 8.7%  R@10 2%"
    )
    console.print(line.get_renderable())
    (shown,) = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    for part in ("30000/70829 steps", "ETA -:--:--", "loss 5.0382  95 images/s"):
        assert part in shown


def test_rarely_shows_the_first_of_each_while(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, shown = [0.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    maybe = throttle(shown.append, 10)
    for second in (0, 9, 10, 11, 25, 34, 35):
        clock[0] = second
        maybe(str(second))
    assert shown == ["0", "10", "25", "35"]


@pytest.mark.parametrize("terminal", [False, True])
def test_what_has_no_known_end_is_counted(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), width=60, force_terminal=terminal, force_interactive=False)
    with count_progress(console, "pictures embedded") as more:
        for _ in range(40):
            clock[0] += 1
            more(100)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).split("\n")  # type: ignore[attr-defined]
    assert "4,000 pictures embedded, 100/s" in lines
    if not terminal:
        assert lines == [*(f"{count:,} pictures embedded, 100/s" for count in (100, 1600, 3100)), lines[-2], ""]
