"""Small indexes: vectors with a modality gap, vector files of a model, and stores of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from nev.config.model_spec import Calibration
from nev.data.vectors import VectorSpec, make_table, write_vectors
from nev.inference.model import Model
from nev.ops.vectors import Floats, round_to, scale_to_unit
from nev.search.fill import fill
from nev.search.index import Index, open_index
from nev.search.open import open_store
from nev.search.plan import Options, Task, make_plan
from nev.search.store import Columns, StoreSpec, VectorStore, make_items

if TYPE_CHECKING:
    import psycopg

WIDTH = 24
STORES = ("exact", "lancedb", "postgres")
WORDS = [f"a {colour} {shape} {n}" for n in range(3) for colour in ("red", "blue") for shape in ("dog", "cat", "car")]
USUAL = Columns(uid="id", vector="embedding", text="content")


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


def add_pictures(address: str, table: str, columns: Columns | None, folder: str, model: Model, **options: Any) -> Index:
    store = open_store(address, table, columns)
    task = Task(store, Options(images=folder, **{"alter_table": True, **options}), lambda: model)
    fill(task, make_plan(task))
    return open_index(address, table)


def write_rows(
    database: psycopg.Connection[Any], model: Model, table: str, columns: str = "content, embedding"
) -> None:
    """Texts of WORDS with their vectors, of length 2: not every program scales them."""
    for text, vector in zip(WORDS, 2 * model.encode_text(WORDS, kind="document"), strict=True):
        database.execute(f"INSERT INTO {table} ({columns}) VALUES (%s, %s)", (text, str(vector.tolist())))


def dump(database: psycopg.Connection[Any], table: str, columns: str = "id, content, embedding::text") -> list[Any]:
    return database.execute(f"SELECT {columns} FROM {table} ORDER BY 1").fetchall()


def list_indexes(database: psycopg.Connection[Any], table: str) -> set[str]:
    return {row[0] for row in database.execute("SELECT indexname FROM pg_indexes WHERE tablename = %s", (table,))}
