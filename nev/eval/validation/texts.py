"""The sentences of a validation: class prompts and captions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.data.index import Index
from nev.data.rows import parse_captions
from nev.data.sidecar import decode_vectors
from nev.data.text_sidecar import text_sidecars
from nev.storage.reading import read_column


class Classes(NamedTuple):
    """Classes as sentences.

    names: in the order of the labels.
    templates: sentences with one `{}` for the name.
    vectors: float32 [C, D], rows of unit length; None where the text tower runs in the training loop.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...]
    vectors: NDArray[np.float32] | None


def read_captions(index: Index) -> list[list[str]]:
    """The captions of each row, in index order. Reads the caption column of every shard once."""
    columns = (read_column(index.location(shard), str(index.columns.caption)) for shard in range(len(index.paths)))
    return [parse_captions(value) for column in columns for value in column.to_pylist()]


def read_caption_vectors(index: Index, key: str, width: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The captions' vectors from the sidecars, in index order, without a caption being read.

    Returns float32 [m, D], rows of unit length, and int64 [m], the row that each caption describes.
    """
    vectors, owner, row, sidecars = [], [], 0, text_sidecars(index, key, width)
    for shard in range(len(index.paths)):
        column = read_column(sidecars.location(shard), "vectors", sidecars.remedy)
        part, starts = decode_vectors(column, width)
        vectors.append(part.astype(np.float32))
        owner.append(row + np.repeat(np.arange(len(starts) - 1), np.diff(starts)))
        row += len(starts) - 1
    stacked = np.concatenate(vectors)
    return stacked / np.linalg.norm(stacked, axis=1, keepdims=True), np.concatenate(owner)
