"""docs/runbook.md: what it quotes as nev's words are words of nev's source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).parents[2]
BLOCK = re.compile(r'^```text title="nev[^"]*"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def quoted() -> Iterator[str]:
    """The pieces of nev's messages, between what differs from run to run."""
    for block in BLOCK.findall((REPO / "docs" / "runbook.md").read_text(encoding="utf-8")):
        for line in block.splitlines():
            yield from (piece for piece in line.split("…") if re.search(r"\w{3}", piece))


def source_texts() -> str:
    """Every text of nev's source; a text that is computed in part is as many texts as there are parts."""
    nodes = (node for file in (REPO / "nev").rglob("*.py") for node in ast.walk(ast.parse(file.read_text("utf-8"))))
    texts = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return "\0".join(re.sub(r"\[/?\w*\]", "", text) for text in texts)  # without rich's colours


def test_quoted_messages_are_nev_s() -> None:
    pieces, texts = list(quoted()), source_texts()
    assert len(pieces) > 25
    for piece in pieces:
        assert piece in texts, f"nev says nowhere: {piece!r}"


def test_the_ten_failures_have_a_chapter_with_words_and_remedies() -> None:
    text = (REPO / "docs" / "runbook.md").read_text(encoding="utf-8")
    chapters = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert len(chapters) == 10
    for chapter in chapters:
        name = chapter.splitlines()[0]
        assert "```text title=" in chapter, f"{name}: no message"
        assert re.search(r"^- ", chapter, re.MULTILINE), f"{name}: nothing to do"
