"""One small model for all tests of the server; a made-up server and a browser for those of its page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from fastapi.testclient import TestClient
from helpers.browser import Watch, open_browser, open_page
from helpers.models import make_experiment, write_checkpoint
from helpers.page_server import PICTURES, TEXTS, Faults, Items, serve_app
from helpers.page_server import make_app as make_page_app

from nev.inference.load import load
from nev.inference.model import Model

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="session")
def small_location(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checkpoint of a small model."""
    return write_checkpoint(make_experiment(tmp_path_factory.mktemp("served")))


@pytest.fixture(scope="session")
def small_model(small_location: str) -> Model:
    return load(small_location, device="cpu")


@pytest.fixture(scope="session")
def client(small_model: Model) -> Iterator[TestClient]:
    """A client of the small model, in this process."""
    from nev.serve.app import make_app
    from nev.serve.torch_engine import make_engine

    with TestClient(make_app(make_engine(small_model))) as client:
        yield client


# -- the page: the browser is closed after each file, since its event loop would break asynchronous tests of others --


@pytest.fixture(scope="module")
def items() -> Items:
    return Items(PICTURES, TEXTS)


@pytest.fixture(scope="module")
def served(items: Items) -> Iterator[tuple[str, Faults]]:
    faults = Faults()
    with serve_app(make_page_app(faults, items)) as url:
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
