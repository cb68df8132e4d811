"""A row on its way into a shard, and the rule that says which rows may go in.

Readers (`nev.data.sources`, `nev.data.prepare.synthetic`) yield rows as they find them, faults and all. `usable_rows` is the one
place where a row is left out, so every row that went in is either in a shard or counted under a reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NotRequired, TypedDict

from nev.config.data import Limits

MAX_REASON, MAX_REASONS = 100, 100  # characters, and how many: a source may bring its own (`status`)


class Row(TypedDict):
    """One picture with its caption(s).

    uid: unique over the whole set. image: encoded bytes (JPEG, PNG, WebP). caption: one sentence or several.
    label, label_name: the class, where there is one. score: how well they fit, where it is asked for; it is not written. extra:
    what else was asked for; it is not written either. reject: set by a reader that knows why the row can't be used. image_hash:
    of the image as it came, where equal ones are to be left out (`nev.data.prepare.filters`).
    """

    uid: str
    image: bytes | None
    caption: str | list[str] | None
    label: NotRequired[int | None]
    label_name: NotRequired[str | None]
    score: NotRequired[float | None]
    extra: NotRequired[dict[str, Any]]
    reject: NotRequired[str]
    image_hash: NotRequired[bytes]


def parse_captions(caption: str | list[str] | None) -> list[str]:
    """The captions of a row, given as one or as a list, without outer white space; null and blank ones do not count."""
    given = [caption] if caption is None or isinstance(caption, str) else caption
    return [sentence.strip() for sentence in given if sentence and sentence.strip()]


def find_fault(row: Row, limits: Limits) -> str | None:
    """Why `row` can't go into a shard, or None. Looks at sizes only: nothing is decoded."""
    if "reject" in row:
        return row["reject"].encode(errors="backslashreplace").decode()[:MAX_REASON]
    if not row["uid"]:
        return "empty uid"
    if not row["image"]:
        return "empty image"
    if len(row["image"]) > limits.max_bytes:
        return f"image over {limits.max_bytes} bytes"
    captions = parse_captions(row["caption"])
    if not captions:
        return "empty caption"
    if not all(map(_encodes, [row["uid"], row.get("label_name") or "", *captions])):
        return "uid, caption or class name with half a surrogate pair"
    if not -(2**63) <= (row.get("label") or 0) < 2**63:
        return "label beyond 64 bits"
    return None


def _encodes(text: str) -> bool:
    """Whether UTF-8 can say `text`: JSON may hold one half of an emoji, where a caption was cut to a length."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def usable_rows(rows: Iterable[Row], dropped: Counter[str], limits: Limits) -> Iterator[Row]:
    """Pass on the rows without a fault, their captions cleaned; count the others in `dropped` by reason."""
    for row in rows:
        if reason := find_fault(row, limits):
            dropped[reason if reason in dropped or len(dropped) < MAX_REASONS else "other reasons"] += 1
        else:
            yield {**row, "caption": parse_captions(row["caption"])}
