"""The page of `nev serve` by keyboard alone, and by the rules of axe: no barrier in any view or state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from helpers.browser import Watch, wait_until
from helpers.page_server import PAGE, Faults, draw_picture
from helpers.page_steps import assert_no_barrier, drop, read_hits, search, settle, visit

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow


def test_the_whole_way_by_keyboard(page: Page, faults: Faults) -> None:
    visit(page, "/")
    keyboard, active = page.keyboard, "document.activeElement"
    page.locator("footer summary").focus()
    keyboard.press("/")
    assert page.evaluate(f"{active}.id") == "words"
    keyboard.type("red/ring")  # the key is a letter here
    keyboard.press("Enter")
    page.wait_for_selector(".hit")
    settle(page)
    assert page.locator("#words").input_value() == "red/ring"
    keyboard.press("ArrowDown")
    columns = page.evaluate(
        "(all => all.filter((one) => one.offsetTop === all[0].offsetTop).length)([...document.querySelectorAll('.hit')])"
    )

    def at() -> int:
        return int(page.evaluate("[...document.querySelectorAll('.similar')].indexOf(document.activeElement)"))

    places = [at()]
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "End", "ArrowRight", "Home"):
        keyboard.press(key)
        places.append(at())
    assert places == [0, 1, 1 + columns, columns, PAGE - 1, PAGE - 1, 0]
    assert page.locator(".similar[tabindex='0']").count() == 1, "one stop of the Tab key"
    keyboard.press("ArrowRight")
    name = read_hits(page)[1]
    keyboard.press("Tab")
    keyboard.press("Shift+Tab")
    assert at() == 1
    keyboard.press("Enter")
    wait_until(page, "document.querySelector('#chip').textContent.startsWith('Like')")
    settle(page)
    assert page.locator("#chip").inner_text().startswith(f"Like {name}")
    keyboard.press("Escape")
    assert page.evaluate(f"{active}.id") == "words"
    assert (page.locator(".hit").count(), page.locator("#chip").is_hidden()) == (0, True)
    assert page.url.endswith("/")
    visit(page, "/")
    drop(page, draw_picture(1)[0])
    page.wait_for_selector(".hit")
    page.locator(".skip").focus()
    keyboard.press("Shift+Tab")
    keyboard.press("Tab")
    assert page.evaluate(f"{active}.textContent") == "Skip to the hits"
    keyboard.press("Enter")
    assert page.evaluate(f"{active}.id") == "results"
    assert page.locator("#chip").is_visible(), "the picture is still there"


@pytest.mark.parametrize("view", ["/", "/?q=red+ring", "/?q=red+ring&show=apart&calibrated=0", "/?q=red+ring&view=map"])
def test_no_view_has_a_barrier(page: Page, view: str) -> None:
    visit(page, view)
    for closed in page.locator("summary:visible").all():
        closed.click()
    assert_no_barrier(page)


def test_no_state_has_a_barrier(page: Page, watch: Watch, faults: Faults) -> None:
    watch.expected += ["401", "500"]
    faults.token = "opens"
    page.goto("/")
    page.wait_for_selector("dialog[open]")
    assert_no_barrier(page)
    faults.token, faults.answers = "", [(500, {})]
    page.get_by_role("textbox", name="Token").fill("any")
    page.keyboard.press("Enter")
    settle(page)
    search(page, "red")
    drop(page, draw_picture(0)[0])
    page.wait_for_selector("#chip img")
    settle(page)
    page.locator(".similar").first.focus()
    assert_no_barrier(page)
