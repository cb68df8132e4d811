"""What all tests share: the folder of real data, and one Ray cluster a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The real data of `NEV_DATA`; tests that need it skip where it is absent."""
    folder = os.environ.get("NEV_DATA")
    if not folder:
        pytest.skip("NEV_DATA is not set: this test reads real data")
    path = Path(folder).absolute()
    if not path.is_dir():
        pytest.skip(f"NEV_DATA={folder} is not a folder")
    return path


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray of two CPUs for the whole session."""
    import ray

    from nev.runtime import connect

    connect()
    yield
    ray.shutdown()
