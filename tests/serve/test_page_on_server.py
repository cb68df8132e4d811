"""The page on the real application, over a real index and a small model."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.browser import open_browser, open_page, wait_until
from helpers.page_steps import drop, read_hits, search, settle, visit, wait_for_map
from helpers.pictures import encoded, photo
from helpers.serving import picture, run_in_thread

from nev.config.model_spec import Calibration
from nev.inference.model import Model
from nev.search.exact import ExactStore
from nev.search.index import open_index
from nev.search.store import StoreSpec, make_items
from nev.serve.app import make_app
from nev.serve.settings import Settings
from nev.serve.torch_engine import make_engine

TEXTS = [f"{colour} {thing} number {n}" for n in range(10) for colour in ("red", "blue") for thing in ("dog", "house")]
PICTURES = 30


@pytest.mark.slow
def test_the_page_on_the_real_application(small_model: Model, tmp_path: Path) -> None:
    """Words, a picture, both, more like a hit, and the map, with a token."""
    store = ExactStore(str(tmp_path), "items")
    store.apply_changes(small_model.width)
    images = small_model.encode_image([picture(n) for n in range(PICTURES)])
    uids = [f"folder/ä {n}?#%.png" for n in range(PICTURES)]
    thumbnails = [encoded(photo(n)) for n in range(PICTURES)]
    store.upsert(make_items("image", uids, images, source=uids, thumbnail=thumbnails))
    texts = small_model.encode_text(TEXTS, kind="document")
    store.upsert(make_items("text", [f"text-{n}" for n in range(len(TEXTS))], texts, text=TEXTS))
    means = {"image_mean": tuple(images.mean(axis=0).tolist()), "text_mean": tuple(texts.mean(axis=0).tolist())}
    fingerprint, calibration = small_model.text_fingerprint, Calibration(**means)
    store.write_spec(StoreSpec(width=small_model.width, text_fingerprint=fingerprint, calibration=calibration))
    index = open_index(str(tmp_path))
    app = make_app(make_engine(small_model), index, Settings(token="opens"))
    with run_in_thread(app) as url, open_browser() as browser, open_page(browser, url) as (page, watch):
        watch.expected.append("401")
        page.goto("/?view=map")
        page.get_by_role("textbox", name="Token").fill("opens")
        page.keyboard.press("Enter")
        settle(page)
        search(page, TEXTS[3])
        assert TEXTS[3] in read_hits(page)
        assert len(wait_for_map(page, "s.star")["lit"]) == len(read_hits(page)) == 24
        wait_until(page, "[...document.querySelectorAll('.hit img')].some((one) => one.naturalWidth > 0)")
        for switched in (False, True):
            page.get_by_role("switch", name="Calibrated").click()
            settle(page)
            ranked = index.search(small_model.encode_text(TEXTS[3]), top=24, calibrated=switched)
            assert read_hits(page) == [hit.text or hit.source for hit in ranked]
        page.get_by_role("searchbox").fill("")
        drop(page, picture(4))
        wait_until(page, "document.querySelector('#chip').textContent")
        settle(page)
        assert read_hits(page)[0] == uids[4]
        page.locator(".hit .similar").first.click()
        settle(page)
        assert uids[4] not in read_hits(page)
        visit(page, page.url)
        assert uids[4] not in read_hits(page)
