"""The page of `nev serve`, by clicking and typing in a real Chromium, over an API of drawn pictures and made-up vectors."""

from __future__ import annotations

import base64
import io
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers.browser import Watch, open_browser, open_page, wait_until
from helpers.page_server import ODD_UID, SCRIPT, Faults, Items, draw_picture, make_app, rank, serve_app
from helpers.page_steps import (
    assert_no_barrier,
    drop,
    paste,
    read_hits,
    read_summary,
    search,
    settle,
    state_of_map,
    visit,
    wait_for_map,
)
from PIL import Image

from nev.serve.page import FILES, FOLDER

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow

PICTURES, TEXTS, PAGE = 50, 60, 24


@pytest.fixture(scope="module")
def items() -> Items:
    return Items(PICTURES, TEXTS)


@pytest.fixture(scope="module")
def served(items: Items) -> Iterator[tuple[str, Faults]]:
    faults = Faults()
    with serve_app(make_app(faults, items)) as url:
        yield url, faults


@pytest.fixture
def faults(served: tuple[str, Faults]) -> Faults:
    """What the server does in this test, at its defaults."""
    vars(served[1]).update(vars(Faults()))
    return served[1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def opened(browser: Browser, served: tuple[str, Faults], faults: Faults) -> Iterator[tuple[Page, Watch]]:
    with open_page(browser, served[0]) as opened:
        yield opened


@pytest.fixture
def page(opened: tuple[Page, Watch]) -> Page:
    return opened[0]


@pytest.fixture
def watch(opened: tuple[Page, Watch]) -> Watch:
    return opened[1]


def rank_names(items: Items, top: int = PAGE, **query: Any) -> list[str]:
    """Names of the hits that the ranking has for a query."""
    empty = {"text": None, "image": None, "uid": None, "kind": None, "min_percentile": None, "hybrid": False}
    body = {**empty, "calibrated": True, "offset": 0, "top": top, **query}
    return [hit["text"][:120] for hit in rank(items, body, Faults())["hits"]]


def sent_picture(faults: Faults) -> bytes:
    return base64.b64decode(faults.queries[-1]["image"].partition(",")[2])


def test_the_files_are_small_and_their_headers_strict(served: tuple[str, Faults]) -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(name for _, name, _ in FILES)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 40_000
    for address, name, media_type in FILES:
        with urllib.request.urlopen(served[0] + address) as answer:
            assert answer.read() == (FOLDER / name).read_bytes()
            headers = answer.headers
        assert headers["Content-Type"] == f"{media_type}; charset=utf-8"
        assert headers["Content-Security-Policy"].startswith("default-src 'self'; img-src 'self' blob: data:;")
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("nosniff", "no-referrer")
        request = urllib.request.Request(served[0] + address, headers={"If-None-Match": headers["ETag"]})
        with pytest.raises(urllib.error.HTTPError, match="304"):
            urllib.request.urlopen(request)


def test_words_give_a_grid_in_order(page: Page, items: Items, faults: Faults) -> None:
    visit(page, "/")
    assert page.evaluate("document.activeElement.id") == "words"
    assert read_summary(page).startswith("Type words")
    search(page, "red ring")
    assert read_hits(page) == rank_names(items, text="red ring")
    first = page.locator(".hit").first
    best = rank(items, {**faults.queries[0]}, Faults())["hits"][0]
    assert f"{best['score']:.3f}" in first.inner_text()
    assert "top of the" in first.inner_text()
    assert "top 2 % of" in page.locator("#lists").inner_text()
    assert re.fullmatch(r"The first 24 hits: \d+ pictures and \d+ texts", read_summary(page))
    assert page.title() == "red ring · nev"
    assert page.url.endswith("/?q=red+ring")


def test_a_picture_is_dropped_and_words_are_added(page: Page, items: Items, faults: Faults) -> None:
    data, _ = draw_picture(3)
    visit(page, "/")
    drop(page, data)
    page.wait_for_selector(".hit")
    settle(page)
    assert sent_picture(faults) == data
    assert page.locator("#chip").inner_text().startswith("drop.jpg")
    url = faults.queries[-1]["image"]
    assert read_hits(page) == rank_names(items, image=url)
    search(page, "ring")
    assert read_hits(page) == rank_names(items, image=url, text="ring") != rank_names(items, image=url)
    page.get_by_role("button", name="Remove").click()
    settle(page)
    assert read_hits(page) == rank_names(items, text="ring")
    page.go_back()
    assert read_hits(page) == rank_names(items, image=url, text="ring")
    assert len(faults.queries) == 3, "the back button asks nothing"
    page.reload()
    settle(page)
    page.go_back()
    wait_until(page, "document.querySelector('#summary').textContent.startsWith('A link holds no picture')")


def test_a_picture_is_pasted_or_chosen(page: Page, faults: Faults) -> None:
    data, _ = draw_picture(4)
    visit(page, "/")
    paste(page, data, text="a cell of a table, of which the office program sends a picture, too")
    assert page.locator("#chip").is_hidden()
    paste(page, data)
    page.wait_for_selector(".hit")
    assert sent_picture(faults) == data
    # A large file is drawn smaller; so is a form that the service may not read.
    buffer = io.BytesIO()
    Image.new("1", (2000, 1100)).save(buffer, "BMP")
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose a picture").click()
    with page.expect_response("**/search"):
        chooser.value.set_files({"name": "large.bmp", "mimeType": "image/bmp", "buffer": buffer.getvalue()})
    with Image.open(io.BytesIO(sent_picture(faults))) as picture:
        assert (picture.format, picture.size) == ("WEBP", (1600, 880))


def test_what_is_no_picture_is_refused(page: Page, faults: Faults) -> None:
    visit(page, "/")
    drop(page, b"words", "notes.txt", "text/plain")
    assert page.get_by_role("alert").inner_text() == "notes.txt is no picture."
    drop(page, b"<svg/>", "drawing.svg", "image/svg+xml")
    wait_until(page, "document.querySelector('#notice').textContent.includes('cannot read drawing.svg')")
    assert faults.queries == []


def test_the_calibration_is_a_switch(page: Page, items: Items) -> None:
    visit(page, "/?q=red+ring")
    assert "0 pictures" not in read_summary(page)
    page.get_by_role("switch", name="Calibrated").click()
    settle(page)
    assert read_hits(page) == rank_names(items, text="red ring", calibrated=False)
    assert read_summary(page) == "The first 24 hits: 0 pictures and 24 texts"
    assert "crowd out" in page.locator("#hint").inner_text()
    page.get_by_role("switch", name="Calibrated").click()
    settle(page)
    assert page.locator("#hint").is_hidden()
    assert read_hits(page) == rank_names(items, text="red ring")


def test_without_means_there_is_no_switch(page: Page, faults: Faults) -> None:
    faults.calibration = faults.hybrid = False
    visit(page, "/?q=red+ring&hybrid=1")
    assert page.get_by_role("switch").count() == 0
    assert faults.queries[0]["calibrated"] is faults.queries[0]["hybrid"] is False


def test_hits_of_one_kind_and_hits_apart(page: Page, items: Items) -> None:
    visit(page, "/?q=red+ring")
    for label, kind in (("Pictures", "image"), ("Texts", "text")):
        page.get_by_text(label, exact=True).click()
        settle(page)
        assert read_hits(page) == rank_names(items, text="red ring", kind=kind)
    page.get_by_text("Apart", exact=True).click()
    settle(page)
    sections = [f"#lists section:nth-child({n})" for n in (1, 2)]
    for section, kind in zip(sections, ("image", "text"), strict=True):
        assert read_hits(page, section) == rank_names(items, text="red ring", kind=kind)
    page.get_by_role("button", name="More texts").click()
    settle(page)
    assert read_hits(page, sections[1]) == rank_names(items, text="red ring", kind="text", top=2 * PAGE)
    assert len(read_hits(page, sections[0])) == PAGE


def test_more_until_the_end(page: Page, items: Items) -> None:
    visit(page, "/?q=red+ring")
    while page.get_by_role("button", name="More hits").is_visible():
        page.get_by_role("button", name="More hits").click()
        settle(page)
        assert page.evaluate("document.activeElement.className") == "similar", "the first new hit has the focus"
    assert read_hits(page) == rank_names(items, text="red ring", top=200)
    assert read_summary(page) == f"All {PICTURES + TEXTS} hits: {PICTURES} pictures and {TEXTS} texts"


def test_the_cut_off_is_a_percentile(page: Page, items: Items, faults: Faults) -> None:
    visit(page, "/?q=red+ring")
    for _ in range(3):
        page.get_by_label("Keep").press("ArrowRight")
        settle(page)
    assert page.locator("#cut-words").inner_text() == "the top 10 %"
    assert faults.queries[-1]["min_percentile"] == 90
    assert read_hits(page) == rank_names(items, text="red ring", min_percentile=90)
    assert read_summary(page).startswith("All ")
    assert page.url.endswith("cut=90")


def test_few_items_have_no_percentiles(page: Page) -> None:
    def strip(route: Any) -> None:
        answer = route.fetch().json()
        route.fulfill(json={**answer, "hits": [{**hit, "percentile": None} for hit in answer["hits"]]})

    page.route("**/search", strip)
    visit(page, "/?q=red+ring")
    assert page.locator("#cut").is_disabled()
    assert page.locator("#cut-words").inner_text() == "all (too few items)"
    assert " % of" not in page.locator("#lists").inner_text()


def test_full_text_where_the_index_has_it(page: Page, items: Items) -> None:
    visit(page, "/?q=red+ring")
    page.get_by_role("switch", name="Full text").click()
    settle(page)
    assert read_hits(page) == rank_names(items, text="red ring", hybrid=True)
    assert len(read_hits(page)) < PAGE


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


def test_texts_are_never_markup(page: Page, items: Items) -> None:
    visit(page, "/?q=red+ring&view=map")
    number = next(n for n, name in enumerate(read_hits(page)) if name.startswith(SCRIPT[:90]))
    assert SCRIPT in page.locator("#lists .words").nth(number).inner_text()
    page.locator("#lists .similar").nth(number).focus()
    assert page.locator("#point .words").inner_text().startswith(SCRIPT)
    page.locator("#table summary").click()
    page.locator("#table td", has_text=SCRIPT[:50]).wait_for()
    page.locator("#lists .similar").nth(number).press("Enter")
    settle(page)
    assert SCRIPT[:20] in page.locator("#chip").inner_text()
    search(page, SCRIPT)
    visit(page, f"/?q={SCRIPT}&uid={items.uids[PICTURES]}")
    assert page.locator("script").count() == 1
    assert page.title() == f"{SCRIPT} · nev"
    assert page.locator("img[src=x]").count() == 0


def test_uids_are_any_words(page: Page, items: Items) -> None:
    visit(page, "/")
    page.evaluate("(uid) => location.assign('/?' + new URLSearchParams({uid}))", ODD_UID)
    page.wait_for_selector(".hit")
    settle(page)
    assert read_hits(page) == rank_names(items, uid=ODD_UID)
    wait_until(page, "document.querySelector('#chip img').naturalWidth > 0")


def test_a_long_text_opens(page: Page) -> None:
    visit(page, "/?q=green+square&show=text")
    long = page.locator("details.words")
    assert "much more of a caption" not in long.inner_text()
    long.locator("summary").click()
    assert "much more of a caption" in long.inner_text()


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


def test_nothing_is_found(page: Page) -> None:
    visit(page, "/?q=red+ring&show=image&cut=99.9")
    assert read_summary(page) == "All 1 hit: 1 picture and 0 texts"
    visit(page, "/?q=red+ring+nowhere&hybrid=1&cut=99.9")
    assert read_summary(page) == "No hit. The cut-off may be too high."


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


def test_without_an_index_sentences_are_compared_with_a_picture(page: Page, faults: Faults) -> None:
    faults.indexed = False
    data, caption = draw_picture(2)
    assert "red star" in caption
    visit(page, "/")
    assert "nev index" in page.locator("#no-index").inner_text()
    assert page.locator("#options").is_hidden()
    page.locator("#file").set_input_files({"name": "p.jpg", "mimeType": "image/jpeg", "buffer": data})
    wait_until(page, "document.querySelector('#notice').textContent.includes('type sentences')")
    search(page, "a blue ring; ;a red star ; an orange cross;")
    scores = [float(text) for text in page.locator(".score").all_inner_texts()]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert read_hits(page)[0] == "a red star"


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
