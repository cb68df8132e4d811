"""Reading a source as the tests of readers need it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from nev.data.rows import Row
from nev.data.sources import SOURCES, SourceOptions, iterate_rows


def read(kind: str, inputs: Sequence[str | Path], options: SourceOptions) -> Iterator[Row]:
    """All rows of a source."""
    return iterate_rows(SOURCES[kind](inputs, options))
