"""Which rows of a source go into the shards: by list, size, caption, score, and once for each image.

A row is held against the cheapest rule first, and every row that is left out is counted under the rule that it broke.
Sizes are read from the image's header: no pixel is decoded.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from nev.config import Limits, Positive, Section
from nev.data.decode import BadImage, read_header
from nev.data.rows import Row, captions_of
from nev.data.uids import find, read_uids

Rule = Callable[[Row], str | None]


class Filters(Section):
    """What a row must satisfy; None asks for nothing. Bounds are inclusive.

    uids: a list of uids to keep (see `nev.data.uids.read_uids`), such as a DFN. min_side: pixels of the shorter side.
    max_aspect: longer side / shorter side. min_caption, max_caption: characters; a row keeps those of its captions that
    fit. score, min_score: the source's column, and its least value. unique: of rows with the same image bytes the first.
    """

    uids: Path | None = None
    min_side: Positive | None = None
    max_aspect: Annotated[float, Field(ge=1)] | None = None
    min_caption: Positive | None = None
    max_caption: Positive | None = None
    score: str | None = None
    min_score: float | None = None
    unique: bool = False

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.score is None) != (self.min_score is None):
            raise ValueError("min_score needs the score column, and a score column needs its min_score: give both")
        if self.min_caption and self.max_caption and self.min_caption > self.max_caption:
            raise ValueError(f"min_caption ({self.min_caption}) is more than max_caption ({self.max_caption})")
        return self


def select(rows: Iterable[Row], filters: Filters, limits: Limits, dropped: Counter[str]) -> Iterator[Row]:
    """Pass on the rows that satisfy `filters`, their captions chosen; count the others in `dropped` by reason.

    Raises ConfigError, before the first row is read, if the list of uids is not readable.
    """
    rules = _rules(filters, limits)
    for row in rows:
        chosen: Row = {**row, "caption": _fitting(row, filters)}
        if reason := next((reason for rule in rules if (reason := rule(chosen))), None):
            dropped[reason] += 1
        else:
            yield chosen


def _rules(filters: Filters, limits: Limits) -> list[Rule]:
    rules: list[Rule] = []
    if filters.uids is not None:
        rules.append(_listed(filters.uids))
    if filters.min_score is not None:
        rules.append(_scored(filters.min_score))
    if filters.min_caption or filters.max_caption:
        rules.append(lambda row: None if row["caption"] else "caption length")
    if filters.min_side or filters.max_aspect:
        rules.append(_sized(filters.min_side or 0, filters.max_aspect or float("inf"), limits))
    if filters.unique:
        rules.append(_first_of_its_image())  # last: a row that another rule drops does not stand for its image
    return rules


def _fitting(row: Row, filters: Filters) -> list[str]:
    low, high = filters.min_caption or 0, filters.max_caption or float("inf")
    return [caption for caption in captions_of(row["caption"]) if low <= len(caption) <= high]


def _listed(path: Path) -> Rule:
    keys = read_uids(path)
    return lambda row: "uid not in the list" if find(keys, row["uid"]) is None else None


def _scored(least: float) -> Rule:
    def rule(row: Row) -> str | None:
        score = row.get("score")
        if score is None or score != score:  # NaN
            return "no score"
        return f"score below {least:g}" if score < least else None

    return rule


def _sized(least: int, aspect: float, limits: Limits) -> Rule:
    def rule(row: Row) -> str | None:
        try:
            header = read_header(row["image"] or b"", limits)
        except BadImage:
            return "image header not readable, or over the limits"
        short, long = sorted((header.height, header.width))
        if short < least:
            return f"shorter side below {least}"
        return f"aspect above {aspect:g}" if long > aspect * short else None

    return rule


def _first_of_its_image() -> Rule:
    """Exact duplicates, by hash. Costs some 100 bytes of memory for each row that is kept."""
    seen: set[bytes] = set()

    def rule(row: Row) -> str | None:
        digest = hashlib.blake2b(row["image"] or b"", digest_size=16).digest()
        if digest in seen:
            return "duplicate image"
        seen.add(digest)
        return None

    return rule
