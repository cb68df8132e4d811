"""What all tests share: the folder of real data, and one Ray cluster a session."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from nev.config import Experiment, parse

settings.register_profile("nev", deadline=None)  # no test fails because the machine is busy
settings.load_profile("nev")

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


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn set of 1,024 + 128 captioned pictures, with the real text tower's sidecars and classes.txt."""
    from nev.config import Columns, Text
    from nev.data.index import build_index
    from nev.data.sidecar import sidecar_key, write_sidecar
    from nev.data.synthetic import write_synthetic
    from nev.models.text import load_text

    folder = tmp_path_factory.mktemp("pictures")
    write_synthetic(folder, train=1024, val=128, seed=0)
    tower = load_text(Text())
    for split in ("train", "val"):
        index = build_index(str(folder / split), Columns())
        key = sidecar_key(tower.fingerprint, index.columns.caption or "")
        for shard in range(len(index.paths)):
            write_sidecar(index, shard, key, tower.width, tower.encode)
    return folder


@pytest.fixture
def tiny(pictures: Path, tmp_path: Path) -> Callable[..., Experiment]:
    """Makes a small experiment over `pictures`, with overrides given as `section__key=value`."""

    def make(**overrides: object) -> Experiment:
        raw = {
            "name": "tiny",
            "output": str(tmp_path / "runs"),
            "data": {
                "train": str(pictures / "train"),
                "val": str(pictures / "val"),
                "image_size": 32,
                "block_rows": 32,
            },
            "vision": {
                "trunk": "vit_tiny_patch16_224",
                "trunk_args": {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
            },
            "optim": {"lr": 1e-3, "warmup_steps": 5},
            "train": {"global_batch": 64, "steps": 20, "log_every": 1, "checkpoint_every": 10},
            "eval": {
                "zero_shot": {"classes": str(pictures / "classes.txt"), "templates": ["a {}"]},
                "retrieval": True,
                "best": "zero_shot/top1",
            },
            "workers": {"count": 1, "threads": 1},
        }
        flat = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in overrides.items()]
        return parse(Experiment, raw, flat)

    return make
