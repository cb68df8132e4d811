"""A small prepare whose tasks are counted, and that crashes where a test wants it to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nev.data.prepare.pipeline import PrepareReport, Run, prepare, run_here
from nev.data.prepare.scatter import BUCKET_BYTES
from nev.data.prepare.shards import Layout
from nev.data.rows import Row
from nev.data.sources import Part, Source

PARTS, ROWS = 4, 70
LAYOUT = Layout(rows_per_shard=16, row_group_rows=8)
SHARDS = 5
TASKS = PARTS + SHARDS


class Crash(Exception):
    """Power off."""


def row(number: int) -> Row:
    label = number % 3
    return {
        **{"uid": f"row-{number}", "image": f"image {number}".encode() * 9, "caption": f"caption {number}"},  # type: ignore[typeddict-item]
        **{"label": label, "label_name": "abc"[label]},
    }


def read(numbers: Sequence[int]) -> Iterator[Row]:
    return map(row, numbers)


def source(count: int = ROWS, nbytes: int = 6 * BUCKET_BYTES) -> Source:
    parts = [Part(f"from{at}", range(at, min(at + 18, count))) for at in range(0, count, 18)]
    return Source(parts, read, nbytes, {"source": "test", "rows": count})


def make(output: Path, run: Run = run_here, **options: Any) -> PrepareReport:
    return prepare(source(), output, **{"layout": LAYOUT, "memory_bytes": 5 * 1024, "run": run, **options})


def counting(done: list[Any], stop_after: int = TASKS) -> Run:
    """Runs tasks here, notes them in `done`, and crashes when so many are done."""

    def run(function: Callable[[Any], Any], items: Sequence[Any], task_bytes: int) -> Iterator[Any]:
        for item in items:
            if len(done) == stop_after:
                raise Crash
            done.append(item)
            yield function(item)

    return run


def contents(output: Path) -> dict[str, bytes]:
    """All files of a split and beside it."""
    return {
        str(path.relative_to(output.parent)): path.read_bytes() for path in output.parent.rglob("*") if path.is_file()
    }
