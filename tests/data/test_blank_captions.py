"""Captions without a character that anybody sees are empty captions."""

from __future__ import annotations

import pytest

from nev.config.data import Limits
from nev.data.rows import find_fault, parse_captions

BLANK = ["", " \t\n", "\u200b", "\ufeff", "\0", "\u200b\u200d \ufeff", "\u2060", "\u00ad", "\u3000", "\x1b", None]
SEEN = ["a dog", "\ufeffa dog", ".", "\u200bx", "犬", "👩\u200d🚀", "\u0301a", "0"]


@pytest.mark.parametrize("caption", BLANK)
def test_blank_captions_do_not_count(caption: str | None) -> None:
    assert parse_captions(caption) == []
    assert parse_captions(["a dog", caption or ""]) == ["a dog"]
    assert find_fault({"uid": "a", "image": b"x", "caption": caption}, Limits()) == "empty caption"


@pytest.mark.parametrize("caption", SEEN)
def test_others_count(caption: str) -> None:
    assert parse_captions(caption) == [caption]
