"""The map of the page of `nev serve`: lit points, the gap of the modalities, movement by mouse, keys and fingers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers.browser import open_page, wait_until
from helpers.page_server import PAGE, PICTURES, TEXTS, Faults, Items, rank
from helpers.page_steps import search, settle, state_of_map, visit, wait_for_map

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow


def test_the_map_lights_up_a_search(page: Page, items: Items, faults: Faults) -> None:
    visit(page, "/")
    page.get_by_role("link", name="Map").click()
    state = wait_for_map(page, "s.lit")
    assert (state["lit"], state.get("star"), state["k"]) == ([], None, 1)
    assert f"{PICTURES} pictures" in page.locator("#legend").inner_text()
    search(page, "red ring")
    state = wait_for_map(page, "s.star")
    hits = rank(items, faults.queries[-1], faults)["hits"]
    assert state["lit"] == [hit["uid"] for hit in reversed(hits)]
    assert page.locator("#canvas").get_attribute("aria-label") == "Map of 110 pictures and texts, 24 of 24 hits lit"
    # A card of the list shows its point, and the point its card, with the picture.
    page.locator(".hit.image .similar").first.focus()
    best = next(hit for hit in hits if hit["kind"] == "image")
    state = wait_for_map(page, f"s.selected === {json.dumps(best['uid'])}")
    wait_until(page, "document.querySelector('#point img').naturalWidth > 0")
    assert best["text"] in page.locator("#point").inner_text()
    # So does the pointer, and a click searches for more like the point.
    page.mouse.move(5, 5)
    page.locator("#canvas").hover(position={"x": 3, "y": 3})
    wait_for_map(page, "s.selected === null")
    assert page.locator("#point").is_hidden()
    x, y = state["chosen"]
    page.locator("#canvas").hover(position={"x": x, "y": y})
    state = wait_for_map(page, "s.selected")
    page.locator("#canvas").click(position={"x": x, "y": y})
    wait_until(page, "document.querySelector('#chip').textContent.startsWith('Like')")
    settle(page)
    assert faults.queries[-1]["uid"] == state["selected"]


def test_the_map_shows_the_gap_and_its_calibration(page: Page, items: Items, faults: Faults) -> None:
    """Without calibration pictures and texts lie apart; with it they lie over each other."""
    page.emulate_media(reduced_motion="no-preference")  # points move
    visit(page, "/?q=red+ring&view=map&calibrated=0")
    page.locator("#table summary").click()
    wait_until(page, f"document.querySelectorAll('#table tr').length === {1 + PICTURES + TEXTS}")
    gaps = {}
    for calibrated in (False, True):
        places: dict[str, list[list[float]]] = {"picture": [], "text": []}
        for row in page.locator("#table tr").all()[1::6]:
            row.locator("button").focus()
            places[row.locator("td").nth(1).inner_text()].append(state_of_map(page)["chosen"])
        left, right = (np.array(rows) for rows in places.values())
        spread = np.concatenate([left - left.mean(0), right - right.mean(0)]).std()
        gaps[calibrated] = np.linalg.norm(left.mean(0) - right.mean(0)) / spread
        if not calibrated:
            page.get_by_role("switch", name="Calibrated").click()
            settle(page)
            page.wait_for_timeout(1000)
    assert gaps[False] > 2.5
    assert gaps[True] < 1


def test_the_map_has_hits_that_are_not_in_its_sample(page: Page, items: Items, faults: Faults) -> None:
    def small(route: Any) -> None:
        answer = route.fetch().json()
        few = {name: answer[name][:7] for name in ("points", "uids", "kinds", "texts")}
        route.fulfill(json={**answer, **few})

    page.route("**/map?*", small)
    visit(page, "/?q=red+ring&view=map")
    assert len(wait_for_map(page, "s.star")["lit"]) == PAGE
    faults.positions = False
    search(page, "blue ring")
    state = wait_for_map(page, "s.star && s.lit.length < 24")
    assert set(state["lit"]) <= set(items.uids[:7])


def test_the_map_is_moved(page: Page) -> None:
    visit(page, "/?view=map")
    canvas = page.locator("#canvas")
    canvas.hover(position={"x": 200, "y": 200})
    page.mouse.wheel(0, -400)
    near = wait_for_map(page, "s.k > 2")
    page.mouse.down()
    box = canvas.bounding_box()
    assert box
    page.mouse.move(box["x"] + 260, box["y"] + 230, steps=4)
    page.mouse.up()
    far = wait_for_map(page, f"s.x > {near['x'] + 50}")
    assert far["x"] - near["x"] == pytest.approx(60, abs=2)
    assert far["y"] - near["y"] == pytest.approx(30, abs=2)
    canvas.focus()
    page.keyboard.press("ArrowLeft")
    wait_for_map(page, f"Math.abs(s.x - {far['x']} - 60) < 1")
    page.keyboard.press("0")
    assert [wait_for_map(page, "s.k === 1")[name] for name in "xy"] == [0, 0]
    page.keyboard.press("+")
    wait_for_map(page, "s.k === 1.5")
    page.get_by_role("button", name="Zoom in").click()
    wait_for_map(page, "s.k === 2.25")
    page.get_by_role("button", name="Reset the map").click()
    wait_for_map(page, "s.k === 1")


def test_the_map_by_fingers(browser: Browser, served: tuple[str, Faults], faults: Faults) -> None:
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with open_page(browser, served[0], **phone) as (page, _):
        visit(page, "/?q=red+ring&view=map")
        state, box = wait_for_map(page, "s.star"), page.locator("#canvas").bounding_box()
        assert box
        page.touchscreen.tap(box["x"] + state["star"][0], box["y"] + state["star"][1])
        selected = wait_for_map(page, "s.selected")
        assert page.locator("#point").is_visible()
        assert faults.queries[-1]["uid"] is None
        page.touchscreen.tap(*(box[side] + at for side, at in zip("xy", selected["chosen"], strict=True)))
        wait_until(page, "document.querySelector('#chip').textContent.startsWith('Like')")
        settle(page)
        assert faults.queries[-1]["uid"] == selected["selected"]
        touch = page.context.new_cdp_session(page)
        for kind, spread in (("touchStart", 20), ("touchMove", 40), ("touchMove", 60), ("touchEnd", 0)):
            fingers = [{"x": box["x"] + 150 + side * spread, "y": box["y"] + 150, "id": side} for side in (0, 1)]
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers if spread else []})
        assert wait_for_map(page, "s.k > 1")["k"] == pytest.approx(3, abs=0.1)
