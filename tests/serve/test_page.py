"""The page of `nev serve`, by clicking and typing in a real Chromium, over an API of drawn pictures and made-up vectors."""

from __future__ import annotations

import base64
import io
import re
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from helpers.browser import wait_until
from helpers.page_server import ODD_UID, PAGE, PICTURES, SCRIPT, TEXTS, Faults, Items, draw_picture, rank, rank_names
from helpers.page_steps import drop, paste, read_hits, read_summary, search, settle, visit
from PIL import Image

from nev.serve.page import FILES, FOLDER

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow


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


def test_nothing_is_found(page: Page) -> None:
    visit(page, "/?q=red+ring&show=image&cut=99.9")
    assert read_summary(page) == "All 1 hit: 1 picture and 0 texts"
    visit(page, "/?q=red+ring+nowhere&hybrid=1&cut=99.9")
    assert read_summary(page) == "No hit. The cut-off may be too high."


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
