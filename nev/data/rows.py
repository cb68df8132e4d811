"""A row of a source, and the rule that decides which rows are written to shards.

Sources (`nev.data.sources`, `nev.data.prepare.synthetic`) yield all rows, with their faults. Rows are left out in `usable_rows`
alone, so every row of a source is either in a shard or counted under a reason.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NotRequired, TypedDict

from nev.config.data import Limits

BLANK = frozenset(("Zs", "Zl", "Zp", "Cc", "Cf"))
MAX_REASON, MAX_REASONS = 100, 100  # characters of a reason, number of reasons: sources may have reasons of their own


class Row(TypedDict):
    """One picture with its caption(s).

    uid: unique over the whole set.
    image: encoded bytes (JPEG, PNG, WebP).
    caption: one sentence, or a list.
    label, label_name: the class, where there is one.
    score: how well picture and caption fit, for filters. Not written.
    source: where the picture lies: the path of its file, TAR/MEMBER, or PARQUET/ROW. Not written.
    offset, nbytes: where the picture begins in its tar, and its size, in bytes. Written in the place of the picture, where
        pictures stay in their tars.
    extra: other columns, for filters. Not written.
    reject: why the row cannot be used, where the source knows a reason.
    image_hash: hash of the image in the source, where duplicates are left out (`nev.data.prepare.filters`).
    """

    uid: str
    image: bytes | memoryview | None
    caption: str | list[str] | None
    label: NotRequired[int | None]
    label_name: NotRequired[str | None]
    score: NotRequired[float | None]
    source: NotRequired[str]
    offset: NotRequired[int]
    nbytes: NotRequired[int]
    extra: NotRequired[dict[str, Any]]
    reject: NotRequired[str]
    image_hash: NotRequired[bytes]


def parse_captions(caption: str | list[str] | None) -> list[str]:
    """The captions of a row, given as one or as a list, without outer white space; null and blank ones do not count.

    Characters that nobody sees (zero-width ones, a byte order mark, NUL) are blank, too.
    """
    captions = [caption] if caption is None or isinstance(caption, str) else caption
    return [sentence.strip() for sentence in captions if sentence and has_words(sentence)]


def has_words(sentence: str) -> bool:
    """Whether a sentence has a character that is neither white space nor invisible (Unicode's categories Z, Cc and Cf)."""
    return any(unicodedata.category(character) not in BLANK for character in sentence)


def find_fault(row: Row, limits: Limits, captioned: bool = True) -> str | None:
    """The reason why a row cannot be written to a shard, or None. Images are not decoded.

    captioned: a row needs a caption.
    """
    if "reject" in row:
        return row["reject"].encode(errors="backslashreplace").decode()[:MAX_REASON]
    if not row["uid"]:
        return "empty uid"
    if not row["image"]:
        return "empty image"
    if len(row["image"]) > limits.max_bytes:
        return f"image over {limits.max_bytes} bytes"
    captions = parse_captions(row["caption"])
    if captioned and not captions:
        return "empty caption"
    if not all(map(_is_encodable, [row["uid"], row.get("label_name") or "", *captions])):
        return "uid, caption or class name with half a surrogate pair"
    if not -(2**63) <= (row.get("label") or 0) < 2**63:
        return "label beyond 64 bits"
    return None


def _is_encodable(text: str) -> bool:
    """Whether UTF-8 can encode `text`. JSON may hold half an emoji, where a caption was truncated."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def usable_rows(rows: Iterable[Row], dropped: Counter[str], limits: Limits) -> Iterator[Row]:
    """Yield the rows without a fault, with clean captions. Count all other rows in `dropped`, by reason."""
    for row in rows:
        if reason := find_fault(row, limits):
            dropped[reason if reason in dropped or len(dropped) < MAX_REASONS else "other reasons"] += 1
        else:
            yield {**row, "caption": parse_captions(row["caption"])}
