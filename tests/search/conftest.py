"""Small models, stores and tables for all tests of the search."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers.models import make_experiment, write_bert, write_checkpoint
from helpers.search import STORES, draw_vectors, make_store, write_pictures

import nev
from nev.inference.model import Model
from nev.search.store import VectorStore

if TYPE_CHECKING:
    import psycopg


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(make_experiment(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def model(checkpoint: str) -> Model:
    return nev.load(checkpoint, device="cpu")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model of the same width, with another vision tower and another text encoder."""
    folder = tmp_path_factory.mktemp("other")
    encoder = write_bert(folder / "another", layers=2)
    text = {"encoder": str(encoder), "max_tokens": 24}
    return nev.load(write_checkpoint(make_experiment(folder, text=text), seed=5), device="cpu")


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> VectorStore:
    """A store of each kind, without a table."""
    address = request.getfixturevalue("postgres") if request.param == "postgres" else ""
    return make_store(request.param, tmp_path, address)


@pytest.fixture
def lance(tmp_path: Path) -> VectorStore:
    return make_store("lancedb", tmp_path)


@pytest.fixture
def database(postgres: str) -> Iterator[psycopg.Connection[Any]]:
    """A database with pgvector, as another program uses it."""
    import psycopg

    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CREATE EXTENSION vector")
        yield connection


@pytest.fixture
def folder(model: Model, tmp_path: Path) -> str:
    """Vector files of 20 pictures."""
    uids = [f"a/{n:02d}.jpg" for n in range(20)]
    return write_pictures(tmp_path / "vectors", model, uids, draw_vectors(20, 3, 0.5, model.width), source=uids)
