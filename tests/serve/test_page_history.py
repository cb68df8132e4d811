"""Links to the page of `nev serve`, its back button and its reloads: each shows the list that was there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from helpers.browser import wait_until
from helpers.page_server import PAGE, PICTURES, Faults, Items, rank_names
from helpers.page_steps import read_hits, search, settle, visit

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow


def test_more_like_a_hit_and_back(page: Page, items: Items, faults: Faults) -> None:
    visit(page, "/?q=red+ring")
    page.get_by_role("button", name="More hits").click()
    settle(page)
    last = page.locator(".hit.image").last
    name = last.locator(".words").inner_text()
    last.scroll_into_view_if_needed()
    height = page.evaluate("scrollY")
    assert height > 100
    last.locator("img").click()
    settle(page)
    uid = items.uids[items.texts.index(name)]
    assert faults.queries[-1]["uid"] == uid
    assert read_hits(page) == rank_names(items, uid=uid)
    assert page.locator("#chip").inner_text().startswith(f"Like {name}")
    assert page.evaluate("scrollY") == 0
    search(page, "blue")
    assert read_hits(page) == rank_names(items, uid=uid, text="blue")
    asked = len(faults.queries)
    page.go_back()
    page.go_back()
    wait_until(page, "document.querySelector('#words').value === 'red ring'")
    assert read_hits(page) == rank_names(items, text="red ring", top=2 * PAGE)
    assert abs(page.evaluate("scrollY") - height) < 2, "the list is where it was left"
    assert len(faults.queries) == asked, "the back button asks nothing"


def test_a_link_shows_what_its_sender_saw(page: Page, items: Items, faults: Faults) -> None:
    uid = items.uids[PICTURES + 5]
    visit(page, f"/?uid={uid}&show=image&calibrated=0&cut=50&view=map")
    names = read_hits(page)
    assert names == rank_names(items, uid=uid, kind="image", calibrated=False, min_percentile=50)
    page.reload()
    settle(page)
    assert read_hits(page) == names
    assert page.get_by_role("radio", name="Pictures").is_checked()
    assert not page.get_by_role("switch", name="Calibrated").is_checked()
    assert page.locator("#cut-words").inner_text() == "the top 50 %"
    assert page.locator("#canvas").is_visible()
    page.get_by_role("link", name="Hits", exact=True).click()
    assert read_hits(page) == names
    assert len(faults.queries) == 2, "another view asks nothing"
    page.go_back()
    assert page.locator("#canvas").is_visible()
    visit(page, "/?q=red&show=everything&cut=7&view=globe")
    assert read_hits(page) == rank_names(items, text="red")


def test_back_after_a_reload(page: Page, items: Items) -> None:
    visit(page, "/?q=red")
    search(page, "blue")
    page.reload()
    settle(page)
    page.go_back()
    wait_until(page, "document.querySelector('#words').value === 'red'")
    settle(page)
    assert read_hits(page) == rank_names(items, text="red")
