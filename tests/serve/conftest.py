"""One small model for all tests of the server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from helpers.models import make_experiment, write_checkpoint

from nev.inference.load import load
from nev.inference.model import Model


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
