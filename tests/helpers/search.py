"""Small indexes: vectors with a modality gap, vector files of a model, and stores of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nev.config.model_spec import Calibration
from nev.data.vectors import VectorSpec, make_table, write_vectors
from nev.inference.model import Model
from nev.ops.vectors import Floats, round_to, scale_to_unit
from nev.search.open import open_store
from nev.search.store import StoreSpec, VectorStore, make_items

WIDTH = 24
STORES = ("exact", "lancedb", "postgres")


def draw_vectors(count: int, seed: int, gap: float, width: int = WIDTH, topics: int = 12) -> Floats:
    """Unit vectors, [count, width], around some topics, all of them shifted by `gap` along one direction."""
    centres = np.random.default_rng(0).normal(size=(topics, width)) / width**0.5
    rng = np.random.default_rng(seed)
    noise = 0.5 * rng.normal(size=(count, width)) / width**0.5
    direction = np.zeros(width)
    direction[0] = gap
    return scale_to_unit(centres[rng.integers(0, topics, count)] + noise + direction)


def draw_pair(images: int, texts: int, width: int = WIDTH) -> tuple[Floats, Floats, Calibration]:
    """Vectors of pictures and of texts, apart by a modality gap, and their means."""
    pictures, sentences = draw_vectors(images, 1, 0.6, width), draw_vectors(texts, 2, -0.6, width)
    means = Calibration(image_mean=tuple(pictures.mean(axis=0)), text_mean=tuple(sentences.mean(axis=0)))
    return pictures, sentences, means


def make_texts(vectors: Floats, prefix: str = "t") -> pa.Table:
    """Items of texts, `t000` and so on; their words have the number of the row."""
    uids = [f"{prefix}{row:03d}" for row in range(len(vectors))]
    return make_items("text", uids, vectors, text=pa.array([f"a dog number{row}" for row in range(len(vectors))]))


def make_images(vectors: Floats, prefix: str = "p") -> pa.Table:
    """Items of pictures, `p000` and so on."""
    uids = [f"{prefix}{row:03d}" for row in range(len(vectors))]
    return make_items(
        "image",
        uids,
        vectors,
        source=pa.array([f"folder/{uid}.jpg" for uid in uids]),
        thumbnail=pa.array([uid.encode() for uid in uids], pa.binary()),
    )


def fill_store(store: VectorStore, images: Floats, texts: Floats, calibration: Calibration | None) -> VectorStore:
    """Make the table of a store, and write pictures and texts."""
    store.apply_changes(images.shape[1])
    store.write_spec(StoreSpec(width=images.shape[1], calibration=calibration))
    store.upsert(make_texts(texts))
    store.upsert(make_images(images))
    return store


def make_store(kind: str, folder: Path, address: str = "", table: str = "items") -> VectorStore:
    """A store of a kind, without a table. address: of PostgreSQL."""
    return open_store(address if kind == "postgres" else str(folder / kind), table, store=kind)


def write_pictures(
    folder: Path, model: Model, uids: list[str], vectors: Floats, precision: str = "float32", **columns: Any
) -> str:
    """A folder with one vector file, as `nev embed-images` writes it."""
    spec = VectorSpec(
        model=model.spec.name,
        fingerprint=model.fingerprint,
        text_fingerprint=model.text_fingerprint,
        width=vectors.shape[1],
        precision=precision,
        calibration=model.spec.calibration,
    )
    name = f"{uids[0].replace('/', '-')}.parquet"
    write_vectors(f"{folder}/{name}", make_table(uids, round_to(vectors, precision), spec, **columns))
    return str(folder)
