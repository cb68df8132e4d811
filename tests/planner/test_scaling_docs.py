"""The tables of docs/scaling.md are what the planner says today."""

from __future__ import annotations

import pytest
from helpers.scaling_docs import PAGE, insert, marks, render


@pytest.mark.slow
def test_the_page_has_the_planner_s_tables() -> None:
    page = PAGE.read_text(encoding="utf-8")
    tables = render()
    for name, table in tables.items():
        begin, end = marks(name)
        assert page.count(begin) == page.count(end) == 1, name
        assert page.partition(begin)[2].partition(end)[0] == table, (
            f"{name}: run PYTHONPATH=.:tests python tests/helpers/scaling_docs.py"
        )
    assert insert(page, tables) == page
