"""From any rows to a split: leave out what can't be used, shuffle, write, and say what happened."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from nev.config import Limits
from nev.data import labels
from nev.data.rows import Row, usable
from nev.data.shards import write_shards


class Report(NamedTuple):
    """What one `prepare` did. bytes: size of the shards on disk. classes: path of classes.txt, where there is one."""

    rows_in: int
    kept: int
    dropped: dict[str, int]
    bytes: int
    seconds: float
    shards: list[Path]
    classes: Path | None


def prepare(
    rows: Iterable[Row],
    output: str | Path,
    *,
    seed: int = 0,
    rows_per_shard: int = 8192,
    row_group_rows: int = 256,
    overwrite: bool = False,
    limit: int | None = None,
    limits: Limits | None = None,
    on_read: Callable[[int], None] | None = None,
    on_write: Callable[[int], None] | None = None,
) -> Report:
    """Write the usable ones of `rows` (the first `limit`) to the folder `output`, and classes.txt beside that folder.

    Rows without image or caption, or with an image above `limits.max_bytes`, are left out and counted by reason.
    `on_read` and `on_write` get the number of rows since their last call.

    Raises ConfigError as `write_shards` does, and where a label has two names; the folder then stays as it was.
    """
    start = time.perf_counter()
    output = Path(output)
    read, written = Counter[str](), Counter[str]()
    dropped: Counter[str] = Counter()
    names: dict[int, str] = {}

    def counted(rows: Iterable[Row]) -> Iterator[Row]:
        for row in islice(rows, limit):
            read["rows"] += 1
            if on_read:
                on_read(1)
            yield row

    def wrote(count: int) -> None:
        written["rows"] += count
        if on_write:
            on_write(count)

    classes = output.absolute().parent / "classes.txt"
    shards = write_shards(
        labels.watch(usable(counted(rows), dropped, limits or Limits()), names, classes),
        output,
        seed=seed,
        rows_per_shard=rows_per_shard,
        row_group_rows=row_group_rows,
        overwrite=overwrite,
        dropped=dropped,
        on_rows=wrote,
    )
    named = bool(names) and labels.write(names, classes)
    size = sum(path.stat().st_size for path in shards)
    seconds = time.perf_counter() - start
    return Report(read["rows"], written["rows"], dict(dropped), size, seconds, shards, classes if named else None)
