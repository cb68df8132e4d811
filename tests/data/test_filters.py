"""Which rows the filters let through, and the reason counted for each of the others."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from nev.config.data import Limits
from nev.data.prepare.filters import Filters, select
from nev.data.rows import Row
from nev.data.uids import read_uids


def picture(width: int, height: int, kind: str = "PNG", shade: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("L", (width, height), shade).save(out, kind)
    return out.getvalue()


def row(uid: str = "u", image: bytes = b"image", caption: str | list[str] = "a caption", **more: Any) -> Row:
    return {"uid": uid, "image": image, "caption": caption, **more}  # type: ignore[typeddict-item]


def chosen(rows: list[Row], limits: Limits | None = None, **filters: Any) -> tuple[list[Row], dict[str, int]]:
    dropped: Counter[str] = Counter()
    listed = read_uids(filters["uids"]) if "uids" in filters else None
    kept = list(select(rows, Filters(**filters), limits or Limits(), dropped, listed))
    assert len(kept) + dropped.total() == len(rows)
    return kept, dict(dropped)


def test_a_score_stored_in_half_the_bits_is_not_below_itself() -> None:
    kept, _ = chosen([row(score=float(np.float32(0.7))), row(score=0.6999)], score="sim", min_score=0.7)
    assert len(kept) == 1


def test_no_filter_drops_nothing() -> None:
    rows = [row(image=b""), row(caption="x"), row(score=None), row(score=-1.0)]
    kept, dropped = chosen(rows)
    assert [one["image"] for one in kept] == [b"", b"image", b"image", b"image"]
    assert not dropped


def test_a_list_of_uids_keeps_its_own(tmp_path: Path) -> None:
    (tmp_path / "dfn.txt").write_text(f"{'a' * 32}\n7\nkey-7\n")
    kept, dropped = chosen([row("a" * 32), row("b" * 32), row("key-7"), row("7")], uids=tmp_path / "dfn.txt")
    assert [one["uid"] for one in kept] == ["a" * 32, "key-7", "7"]
    assert dropped == {"uid not in the list": 1}


def test_sizes_are_inclusive_and_come_from_the_header() -> None:
    whole = picture(90, 40, "JPEG")
    rows = [
        row("exact", picture(20, 40)),
        row("small", picture(19, 19)),
        row("wide", picture(61, 30)),
        row("tall", picture(30, 61)),
        row("no pixels", whole[: whole.index(b"\xff\xda") + 16]),
        row("no image", b"not an image"),
        row("webp", picture(60, 30, "WEBP")),
        row("heavy", picture(1000, 900)),
    ]
    kept, dropped = chosen(rows, Limits(max_pixels=500_000), min_side=20, max_aspect=2)
    assert [one["uid"] for one in kept] == ["exact", "webp"]
    assert dropped == {
        "shorter side below 20": 1,
        "aspect above 2": 3,
        "image header not readable, or over the limits": 2,
    }


def test_a_row_keeps_the_captions_that_fit() -> None:
    rows = [row(caption=["12", "123", "12345", "123456"]), row(caption=["1", "1234567"]), row(caption=" 123 ")]
    kept, dropped = chosen(rows, min_caption=3, max_caption=5)
    assert [one["caption"] for one in kept] == [["123", "12345"], ["123"]]
    assert dropped == {"caption length": 1}


def test_the_score_is_a_least_value() -> None:
    scores = [0.28, 0.2799, None, float("nan"), 1.0]
    kept, dropped = chosen([*(row(score=score) for score in scores), row()], score="sim", min_score=0.28)
    assert [one.get("score") for one in kept] == [0.28, 1.0]
    assert dropped == {"score below 0.28": 1, "no score": 3}


def test_equal_images_have_equal_hashes_and_go_on() -> None:
    rows = [row("a", b"1"), row("b", b"2"), row("c", b"1"), row("d", b"2" + b"\0")]
    kept, dropped = chosen(rows, unique=True)
    hashes = [one["image_hash"] for one in kept]
    assert not dropped
    assert {len(one) for one in hashes} == {16}
    assert [hashes.index(one) for one in hashes] == [0, 1, 0, 3]
    assert "image_hash" not in chosen(rows)[0][0]


@given(st.lists(st.tuples(st.binary(max_size=2), st.sampled_from(["", "x", "xyz"])), max_size=30))
def test_every_row_is_kept_or_counted_once(given_rows: list[tuple[bytes, str]]) -> None:
    rows = [row(str(at), image, caption) for at, (image, caption) in enumerate(given_rows)]
    kept, _ = chosen(rows, min_caption=2)
    assert [one["image"] for one in kept] == [image for image, caption in given_rows if caption == "xyz"]


@pytest.mark.parametrize(
    "filters",
    [
        {"min_score": 0.3},
        {"score": "sim"},
        {"min_caption": 5, "max_caption": 4},
        {"max_aspect": 0.5},
        {"min_side": 0},
        {"max_score": 1},
    ],
)
def test_what_contradicts_itself_is_refused(filters: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Filters(**filters)
