"""The sentences of a validation: class prompts and captions, and where their vectors come from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.data.index import Index
from nev.data.rows import parse_captions
from nev.data.sidecar import WRITE_AGAIN, decode_vectors, sidecar_location
from nev.storage.reading import read_column


class Texts(NamedTuple):
    """The other side of a validation, as far as it is asked for.

    classes: unit float32 [C, D]; captions: unit float32 [m, D], and owner: int64 [m], the row that each describes, in index
    order.
    """

    classes: NDArray[np.float32] | None = None
    captions: NDArray[np.float32] | None = None
    owner: NDArray[np.int64] | None = None


class Classes(NamedTuple):
    """Classes as sentences. vectors: unit float32 [C, D], None where the text tower runs in the loop."""

    names: tuple[str, ...]
    templates: tuple[str, ...]
    vectors: NDArray[np.float32] | None


def all_captions(index: Index) -> list[str]:
    """Every caption of a set, in the order of its sidecars."""
    return [caption for of_row in _captions(index) for caption in of_row]


def caption_owners(index: Index) -> NDArray[np.int64]:
    """The row that each of `all_captions` describes, int64 [m]."""
    counts = [len(of_row) for of_row in _captions(index)]
    return np.repeat(np.arange(len(counts)), counts)


def most_captions(index: Index) -> int:
    """How many captions the row with most of them has."""
    return int(np.bincount(caption_owners(index)).max(initial=0))


def _captions(index: Index) -> list[list[str]]:
    columns = (read_column(index.location(shard), str(index.columns.caption)) for shard in range(len(index.paths)))
    return [parse_captions(value) for column in columns for value in column.to_pylist()]


def load_texts(index: Index, key: str, width: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Every caption's vector, unit float32 [m, D], and the row that it describes, int64 [m], in index order."""
    vectors, owner, row = [], [], 0
    for shard in range(len(index.paths)):
        column = read_column(sidecar_location(index, shard, key), "vectors", WRITE_AGAIN)
        part, starts = decode_vectors(column, width)
        vectors.append(part.astype(np.float32))
        owner.append(row + np.repeat(np.arange(len(starts) - 1), np.diff(starts)))
        row += len(starts) - 1
    stacked = np.concatenate(vectors)
    return stacked / np.linalg.norm(stacked, axis=1, keepdims=True), np.concatenate(owner)
