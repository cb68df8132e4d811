"""One small model for all tests of embedding."""

from __future__ import annotations

import pytest
from helpers.models import make_experiment, write_checkpoint
from helpers.parts import Opened

from nev.embed.same_model import open_model
from nev.inference.model import Model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(make_experiment(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def opened(checkpoint: str) -> Opened:
    return open_model(checkpoint, None, None, False, with_text=False)


@pytest.fixture(scope="session")
def model(opened: Opened) -> Model:
    return opened[0]
