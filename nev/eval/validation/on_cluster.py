"""A validation set embedded on the connected Ray, and its pictures as the model sees them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nev.common.errors import NevError
from nev.data.block import Block
from nev.data.block_plan import Segment, sequential_blocks
from nev.data.decode import Picture
from nev.embed.embedder import Embedder
from nev.embed.images import EmbedJob, EncoderSpec, embed_all
from nev.eval.suite.vectors import Embedded, Texts
from nev.eval.validation.task import Validation
from nev.eval.validation.vectors import load_texts


def embed(
    task: Validation,
    embedder: Embedder,
    gpus_in_use: float = 0.0,
    captions: Sequence[Sequence[str]] | None = None,
) -> tuple[Embedded, Texts]:
    """Embed a validation set under a checkpoint: pictures on the connected Ray, texts without sidecars in this process.

    gpus_in_use: GPUs of the cluster that others hold.
    captions: of each row, where these have been read already.
    """
    encode = embedder.encode_text if embedder.config.text_online else None
    features = task.reader.features
    tower = embedder.encoder_spec(features.shape if features else None)
    return embed_set(task, tower, gpus_in_use), load_texts(task, encode, captions)


def embed_set(task: Validation, tower: EncoderSpec, gpus_in_use: float = 0.0) -> Embedded:
    """Embed the pictures of a validation set, in index order."""
    blocks = sequential_blocks(task.reader.index.rows, task.batch)
    read = functools.partial(_read_segments, reader=task.reader)
    (rows,) = embed_all([EmbedJob(blocks, read)], tower, task.batch * task.reader.row_bytes, gpus_in_use=gpus_in_use)
    if isinstance(rows, NevError):
        raise rows
    return Embedded(rows["vector"], rows["valid"], rows["label"])


def _read_segments(segments: list[Segment], reader: Any) -> Iterator[Block]:
    block: Block = reader.read(segments)
    yield {name: block[name] for name in ("image", "valid", "label")}


def pictures(task: Validation, rows: Sequence[int]) -> list[Picture]:
    """What the model sees of some rows (positions in index order): uint8 [S, S, 3] each."""
    index, reader = task.reader.index, replace(task.reader, features=None)
    ends = np.cumsum(index.rows)
    views = []
    for row in map(int, rows):
        group = int(np.searchsorted(ends, row, side="right"))
        start = int(row - (ends[group] - index.rows[group]))
        views.append(reader.read([Segment(group, start, start + 1)])["image"][0])
    return views
