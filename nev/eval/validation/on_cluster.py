"""A validation set embedded on the connected Ray."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nev.common.errors import NevError
from nev.data.block import Block
from nev.data.plan import Segment, sequential_blocks
from nev.embed.embedder import Embedder
from nev.embed.images import EmbedJob, EncoderSpec, embed_all
from nev.eval.validation.scoring import Embedded
from nev.eval.validation.task import Validation
from nev.eval.validation.texts import Texts
from nev.eval.validation.vectors import load_validation_texts


def embed_set(task: Validation, tower: EncoderSpec, taken: float = 0.0) -> Embedded:
    """Embed a whole validation set on the connected cluster, in index order. taken: as `embed_all` has it."""
    blocks = sequential_blocks(task.reader.index.rows, task.batch)
    read = functools.partial(_segments, reader=task.reader)
    (found,) = embed_all([EmbedJob(blocks, read)], tower, task.batch * task.reader.row_bytes, taken=taken)
    if isinstance(found, NevError):
        raise found
    return Embedded(found["vector"], found["valid"], found["label"])


def _segments(segments: list[Segment], reader: Any) -> Iterator[Block]:
    block: Block = reader.read(segments, 0)
    yield {name: block[name] for name in ("image", "valid", "label")}


def pictures(task: Validation, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
    """The evaluation views of some rows (positions in index order): uint8 [S, S, 3] each."""
    ends = np.cumsum(task.reader.index.rows)
    views = []
    for row in rows.tolist():
        group = int(np.searchsorted(ends, row, side="right"))
        start = int(row - (ends[group] - task.reader.index.rows[group]))
        views.append(task.reader.read([Segment(group, start, start + 1)], 0)["image"][0])
    return views


def embed(task: Validation, embedder: Embedder, gpus_in_use: float = 0.0) -> tuple[Embedded, Texts]:
    """Embed a validation set under a checkpoint: pictures on the connected Ray, texts without sidecars in this process.

    gpus_in_use: GPUs of the cluster that others hold.
    """
    encode = embedder.encode_text if embedder.config.text_online else None
    return embed_set(task, embedder.encoder_spec(), gpus_in_use), load_validation_texts(task, encode)
