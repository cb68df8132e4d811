"""A real Chromium for tests of pages: what a page asks for and complains of is collected, and a page that complains fails."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Chromium of this machine. Skips where there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not path:
        pytest.skip("there is no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield browser
        browser.close()


@dataclass
class Watch:
    """What a page did. complaints: errors of its console and its scripts. requests: addresses. expected: parts of complaints
    that a test provokes.
    """

    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)


@contextmanager
def open_page(browser: Browser, url: str, **options: Any) -> Iterator[tuple[Page, Watch]]:
    """A page in a profile of its own, without animations. At the end it must not have complained, or asked another host.

    options: those of Playwright's `new_context`.
    """
    context = browser.new_context(**{"reduced_motion": "reduce", "base_url": url, **options})
    context.set_default_timeout(20_000)
    page, watch = context.new_page(), Watch()
    page.on("console", lambda line: watch.complaints.append(line.text) if line.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: watch.complaints.append(str(error)))
    page.on("request", lambda request: watch.requests.append(request.url))
    yield page, watch
    context.close()
    assert [line for line in watch.complaints if not any(part in line for part in watch.expected)] == []
    assert [address for address in watch.requests if not address.startswith((url, "data:", "blob:"))] == []


def wait_until(page: Page, condition: str, seconds: float = 20) -> None:
    """Wait until an expression of JavaScript is true. Playwright's `wait_for_function` uses `eval`, which the page forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(f"Boolean({condition})"):
        assert time.monotonic() < end, f"never true: {condition}"
        page.wait_for_timeout(15)
