"""Which rows of a source go into the shards: by list, size, caption and score; and by what equal images are known.

A row is held against the cheapest rule first, and every row that is left out is counted under the rule that it broke.
Sizes are read from the image's header: no pixel is decoded.
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


def select(
    rows: Iterable[Row], filters: Filters, limits: Limits, dropped: Counter[str], allowed_uids: Keys | None = None
) -> Iterator[Row]:
    """Pass on the rows that satisfy `filters`, their captions chosen; count the others in `dropped` by reason.

    listed: what `read_uids` made of `filters.uids`. With `filters.unique` the rows that go on carry their `image_hash`;
    which of equal ones stays is decided when all rows are known (`nev.data.prepare.order`).
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
        # In float32, as scores are mostly stored: there 0.7 is less than 0.7.
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
