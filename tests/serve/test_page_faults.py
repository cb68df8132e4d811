"""The page of `nev serve` where its server refuses, fails or is late."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from helpers.browser import Watch, wait_until
from helpers.page_server import Faults, Items, rank_names
from helpers.page_steps import read_hits, search, settle, visit

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow


def test_a_view_that_is_chosen_before_the_answer(page: Page, items: Items) -> None:
    visit(page, "/")
    late: list[Any] = []
    page.route("**/search", lambda route: late.append(route))
    page.get_by_role("searchbox").fill("red")
    page.keyboard.press("Enter")
    wait_until(page, "document.body.matches('.busy')")
    page.unroute("**/search")
    page.get_by_role("link", name="Map").click()
    page.wait_for_selector(".hit")
    assert read_hits(page) == rank_names(items, text="red")


def test_a_token_is_asked_for(page: Page, watch: Watch, items: Items, faults: Faults) -> None:
    watch.expected.append("401")
    faults.token = "opens"
    page.goto("/?q=red+ring")
    page.get_by_role("button", name="Cancel").click()
    assert "asks for a token" in page.get_by_role("alert").inner_text()
    page.get_by_role("button", name="Try again").click()
    page.get_by_role("textbox", name="Token").fill("wrong")
    page.keyboard.press("Enter")
    wait_until(page, "document.querySelector('#refused').textContent.includes('refused this token')")
    page.get_by_role("textbox", name="Token").fill("opens")
    page.get_by_role("button", name="Continue").click()
    page.wait_for_selector(".hit")
    settle(page)
    assert read_hits(page) == rank_names(items, text="red ring")
    wait_until(page, "[...document.querySelectorAll('.hit img')].every((one) => one.naturalWidth > 0)")
    assert page.locator(".hit img").first.get_attribute("src").startswith("blob:")  # type: ignore[union-attr]
    assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    assert "opens" not in page.url
    page.reload()
    settle(page)
    assert read_hits(page) == rank_names(items, text="red ring")


def test_errors_are_shown_and_tried_again(page: Page, watch: Watch, items: Items, faults: Faults) -> None:
    watch.expected += ["500", "429", "ERR_FAILED"]
    visit(page, "/")
    faults.answers.append((500, {}))
    search(page, "red ring")
    assert page.get_by_role("alert").inner_text().startswith("made-up fault 500")
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector(".hit")
    assert page.locator("#notice").is_hidden()
    # Too many requests: the page waits as long as it was told.
    faults.answers.append((429, {"Retry-After": "1"}))
    page.get_by_role("searchbox").fill("blue")
    page.keyboard.press("Enter")
    wait_until(page, "document.querySelector('#summary').textContent.includes('busy. Next try in 1 s')")
    settle(page)
    assert read_hits(page) == rank_names(items, text="blue")
    page.route("**/search", lambda route: route.abort())
    search(page, "green")
    assert "cannot be reached" in page.get_by_role("alert").inner_text()
    assert page.locator(".hit").count() == 0, "hits of another query beside an error would mislead"
    page.unroute("**/search")
    page.route("**/search", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"))
    watch.expected.append("502")
    search(page, "yellow")
    assert "answered 502" in page.get_by_role("alert").inner_text()


def test_the_last_search_wins(page: Page, items: Items) -> None:
    """The answer of a search that has been replaced comes late, and is not shown."""
    visit(page, "/")
    late: list[Any] = []
    page.route(
        "**/search", lambda route: late.append(route) if "red" in (route.request.post_data or "") else route.continue_()
    )
    page.get_by_role("searchbox").fill("red")
    page.keyboard.press("Enter")
    wait_until(page, "document.body.matches('.busy')")
    search(page, "blue")
    assert len(late) == 1
    late[0].continue_()
    page.wait_for_timeout(200)
    assert read_hits(page) == rank_names(items, text="blue")
