"""From any rows to a split: leave out what can't be used, choose, shrink, shuffle, write, and say what happened."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from nev.config import Limits
from nev.data import labels
from nev.data.contact import contact_sheet
from nev.data.filters import Filters, select
from nev.data.resize import Resize, resized
from nev.data.rows import Row, usable
from nev.data.shards import Layout, write_shards


class Report(NamedTuple):
    """What one `prepare` did. bytes: size of the shards on disk. classes: path of classes.txt, where there is one.

    samples: path of the contact sheet.
    """

    rows_in: int
    kept: int
    dropped: dict[str, int]
    bytes: int
    seconds: float
    shards: list[Path]
    classes: Path | None
    samples: Path


class Progress(NamedTuple):
    """Who is told how many rows were read, and written, since the last call."""

    read: Callable[[int], None] = lambda rows: None
    written: Callable[[int], None] = lambda rows: None


def prepare(
    rows: Iterable[Row],
    output: str | Path,
    *,
    seed: int = 0,
    limit: int | None = None,
    limits: Limits | None = None,
    filters: Filters | None = None,
    resize: Resize | None = None,
    layout: Layout | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write the usable ones of `rows` (the first `limit`) that satisfy `filters` to the folder `output`.

    Beside that folder: classes.txt, and <folder>-samples.png with some of the pictures. Rows without image or caption,
    or with an image above `limits.max_bytes`, are left out and counted by reason, as those that `filters` leave out.

    Raises ConfigError as `write_shards` and `select` do, and where a label has two names; the folder then stays as it
    was.
    """
    start = time.perf_counter()
    output, limits, progress = Path(output), limits or Limits(), progress or Progress()
    read, written = Counter[str](), Counter[str]()
    dropped: Counter[str] = Counter()
    names: dict[int, str] = {}

    def counted(rows: Iterable[Row]) -> Iterator[Row]:
        for row in islice(rows, limit):
            read["rows"] += 1
            progress.read(1)
            yield row

    def wrote(count: int) -> None:
        written["rows"] += count
        progress.written(count)

    beside = output.absolute().parent
    classes = beside / "classes.txt"
    chosen = select(usable(counted(rows), dropped, limits), filters or Filters(), limits, dropped)
    small = resized(chosen, resize, limits, dropped) if resize else chosen
    shards = write_shards(
        labels.watch(small, names, classes), output, seed=seed, layout=layout, dropped=dropped, on_rows=wrote
    )
    named = bool(names) and labels.write(names, classes)
    samples = contact_sheet(shards[0], beside / f"{output.absolute().name}-samples.png", limits)
    return Report(
        rows_in=read["rows"],
        kept=written["rows"],
        dropped=dict(dropped),
        bytes=sum(path.stat().st_size for path in shards),
        seconds=time.perf_counter() - start,
        shards=shards,
        classes=classes if named else None,
        samples=samples,
    )
