"""Filters of a source's rows: by a list of uids, by size, caption and score. And hashes, by which equal images are found.

The cheapest rule is checked first, and every row that is left out is counted under the rule that it broke. Sizes are read from
the header of an image: no pixel is decoded.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from nev.config.base import Positive, Section
from nev.config.data import Limits
from nev.data.decode import BadImage, read_header
from nev.data.rows import Row, parse_captions
from nev.data.uids import Keys, find_uid

HASH_BYTES = 16

Rule = Callable[[Row], str | None]


class Filters(Section):
    """Conditions on a row. None: no condition. Bounds are inclusive."""

    uids: Path | None = None
    """List of uids to keep, such as a DFN (see `nev.data.uids.read_uids`)."""
    min_side: Positive | None = None
    """Least pixels of the shorter side."""
    max_aspect: Annotated[float, Field(ge=1)] | None = None
    """Largest ratio of the longer side to the shorter side."""
    min_caption: Positive | None = None
    """Least characters of a caption. A shorter caption is removed from its row."""
    max_caption: Positive | None = None
    """Most characters of a caption. A longer caption is removed from its row."""
    score: str | None = None
    """Column of the source's score."""
    min_score: float | None = None
    """Least score."""
    unique: bool = False
    """Of several rows with the same image bytes only the first stays."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.score is None) != (self.min_score is None):
            raise ValueError("min_score needs the score column, and a score column needs its min_score: give both")
        if self.min_caption and self.max_caption and self.min_caption > self.max_caption:
            raise ValueError(f"min_caption ({self.min_caption}) is more than max_caption ({self.max_caption})")
        return self


def select(
    rows: Iterable[Row], filters: Filters, limits: Limits, dropped: Counter[str], allowed_uids: Keys | None = None
) -> Iterator[Row]:
    """Yield the rows that satisfy `filters`, with the captions that do. Count all other rows in `dropped`, by reason.

    allowed_uids: the keys that `read_uids` has read from `filters.uids`.

    With `filters.unique` rows get an `image_hash`. Duplicates are left out later, when all rows are known
    (`nev.data.prepare.order`).
    """
    rules = _make_rules(filters, limits, allowed_uids)
    for row in rows:
        chosen: Row = {**row, "caption": _choose_captions(row, filters)}
        if reason := next((reason for rule in rules if (reason := rule(chosen))), None):
            dropped[reason] += 1
            continue
        if filters.unique:
            chosen["image_hash"] = hashlib.blake2b(row["image"] or b"", digest_size=HASH_BYTES).digest()
        yield chosen


def _make_rules(filters: Filters, limits: Limits, allowed_uids: Keys | None) -> list[Rule]:
    rules: list[Rule] = []
    if allowed_uids is not None:
        rules.append(lambda row: "uid not in the list" if find_uid(allowed_uids, row["uid"]) is None else None)
    if filters.min_score is not None:
        rules.append(_make_score_rule(filters.min_score))
    if filters.min_caption or filters.max_caption:
        rules.append(lambda row: None if row["caption"] else "caption length")
    if filters.min_side or filters.max_aspect:
        rules.append(_make_size_rule(filters.min_side or 0, filters.max_aspect or float("inf"), limits))
    return rules


def _choose_captions(row: Row, filters: Filters) -> list[str]:
    low, high = filters.min_caption or 0, filters.max_caption or float("inf")
    return [caption for caption in parse_captions(row["caption"]) if low <= len(caption) <= high]


def _make_score_rule(least: float) -> Rule:
    def rule(row: Row) -> str | None:
        score = row.get("score")
        if score is None or score != score:  # NaN
            return "no score"
        # Compared in float32, in which scores are mostly stored: the float32 of 0.7 is less than the float64 of 0.7.
        return f"score below {least:g}" if np.float32(score) < np.float32(least) else None

    return rule


def _make_size_rule(least: int, aspect: float, limits: Limits) -> Rule:
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
