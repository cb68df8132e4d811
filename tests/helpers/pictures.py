"""Small shards with known contents, for the tests of the data plane."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from nev.config.data import Augment
from nev.data.augment import eval_view, train_view
from nev.data.decode import Encoded

WIDTH = 8


def photo(seed: int, width: int = 24, height: int = 20) -> Image.Image:
    """A smooth picture: what JPEG keeps nearly as it is."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, fmt: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def rows_of(count: int, first: int = 0, **size: int) -> list[dict[str, Any]]:
    return [
        {"uid": f"row-{k}", "image": encoded(photo(k, **size)), "caption": f"caption {k}"}
        for k in range(first, first + count)
    ]


def write_shard(path: Path, rows: list[dict[str, Any]], groups: Sequence[int], schema: pa.Schema | None = None) -> None:
    """Write rows as one shard with row groups of exactly these sizes."""
    assert sum(groups) == len(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema)
    with pq.ParquetWriter(path, table.schema) as writer:
        at = 0
        for size in groups:
            writer.write_table(table.slice(at, size), row_group_size=max(1, size))
            at += size


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Real bytes with a few bytes changed, a run cut out, doubled or overwritten, or the end lost."""
    changed = bytearray(data)
    start = rng.randrange(len(changed))
    length = rng.randrange(1, 64)
    kind = rng.randrange(5)
    if kind == 0:
        for _ in range(rng.randrange(1, 20)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    elif kind == 1:
        del changed[start : start + length]
    elif kind == 2:
        changed[start:start] = changed[start : start + length]
    elif kind == 3:
        changed[start : start + length] = rng.randbytes(length)
    else:
        del changed[start:]
    # Half of the damage goes into the header, which decoders believe.
    if kind == 0 and rng.random() < 0.5:
        changed[rng.randrange(min(64, len(changed)))] = rng.randrange(256)
    return bytes(changed)


def trained_on(image: Encoded, size: int, augment: Augment, rng: random.Random) -> np.ndarray:
    """The training view: uint8 [size, size, 3]."""
    out = np.zeros((size, size, 3), np.uint8)
    train_view(image, out, augment, rng)
    return out


def seen(image: Encoded, size: int) -> np.ndarray:
    """The evaluation view: uint8 [size, size, 3]."""
    out = np.zeros((size, size, 3), np.uint8)
    eval_view(image, out)
    return out


def vector_of(caption: str) -> np.ndarray:
    """A vector that belongs to this caption alone: float16 [WIDTH]."""
    digest = hashlib.blake2b(caption.encode(), digest_size=2 * WIDTH).digest()
    return (np.frombuffer(digest, "<u2").astype(np.float32) / 65536 - 0.5).astype(np.float16)


def encode(captions: Sequence[str]) -> np.ndarray:
    """A text tower that is a table of known vectors: float32 [n, WIDTH]."""
    return np.stack([vector_of(caption) for caption in captions]).astype(np.float32)
