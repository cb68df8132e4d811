"""Steps that tests take on the page of `nev serve`: made-up servers and the real one alike, by the address of the page."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from helpers.browser import wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Page


def settle(page: Page) -> None:
    """Wait until the page has its answer."""
    wait_until(page, "document.querySelector('#about').textContent && !document.body.matches('.busy')")


def search(page: Page, words: str) -> None:
    page.get_by_role("searchbox").fill(words)
    page.get_by_role("searchbox").press("Enter")
    settle(page)


def visit(page: Page, address: str) -> None:
    page.goto(address)
    settle(page)


def read_hits(page: Page, within: str = "#lists") -> list[str]:
    """Names of the hits, in their order."""
    return page.locator(f"{within} .hit .similar").evaluate_all("all => all.map((one) => one.ariaLabel.slice(16))")


def read_summary(page: Page) -> str:
    return page.locator("#summary").inner_text()


def drop(page: Page, data: bytes, name: str = "drop.jpg", kind: str = "image/jpeg") -> None:
    """Drop a file anywhere on the page."""
    transfer = make_transfer(page, data, name, kind)
    page.dispatch_event("footer", "dragover", {"dataTransfer": transfer})
    assert page.locator("body.drop").count() == 1
    page.dispatch_event("footer", "drop", {"dataTransfer": transfer})
    assert page.locator("body.drop").count() == 0


def paste(page: Page, data: bytes, text: str = "") -> None:
    transfer = make_transfer(page, data, "paste.png", "image/jpeg", text)
    page.evaluate(
        "(data) => document.activeElement.dispatchEvent(new ClipboardEvent('paste', "
        "{clipboardData: data, bubbles: true, cancelable: true}))",
        transfer,
    )


def make_transfer(page: Page, data: bytes, name: str, kind: str, text: str = "") -> Any:
    return page.evaluate_handle(
        """([data, name, type, text]) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
            transfer.items.add(new File([bytes], name, { type }));
            if (text) transfer.setData("text/plain", text);
            return transfer;
        }""",
        [base64.b64encode(data).decode(), name, kind, text],
    )


def state_of_map(page: Page) -> dict[str, Any]:
    wait_until(page, "document.querySelector('#canvas').dataset.state")
    return dict(json.loads(page.locator("#canvas").get_attribute("data-state") or ""))


def wait_for_map(page: Page, condition: str) -> dict[str, Any]:
    """Wait until a condition on the map's state `s` is true."""
    wait_until(page, f"(s => {condition})(JSON.parse(document.querySelector('#canvas').dataset.state || '{{}}'))")
    return state_of_map(page)


def assert_no_barrier(page: Page) -> None:
    """No violation of axe's rules in light colours, none of contrast in dark ones; no sideways scrolling on a phone."""
    from axe_playwright_python.sync_playwright import Axe

    for scheme, options in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
        results = Axe().run(page, options={"resultTypes": ["violations"], **options})
        assert results.violations_count == 0, results.generate_report()
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
