"""What ablations change in the training data: fewer rows, captions of other rows, and text vectors that are moved.

Each change depends on (seed, row) or on (seed, epoch, uid) alone, so a resumed run and a run with more workers see the same data.
Without these settings a run reads by `BlockReader`, which knows nothing of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nev.data.block import Block, BlockReader
from nev.data.block_plan import Segment
from nev.data.index import Index


@dataclass(frozen=True)
class AblationReader(BlockReader):
    """A reader of training blocks with changed texts.

    permuted: share of rows that have the caption of another row of their row group.
    mean: float32 [D], subtracted from each text vector. None: nothing is subtracted.
    noise: mean length of the random noise that is added to each text vector.

    `mean` and `noise` are collapse and corrupt of Zhang et al. 2024 ("Connect, Collapse, Corrupt").
    """

    permuted: float = 0.0
    mean: NDArray[np.float32] | None = None
    noise: float = 0.0

    def _fill(self, part: Block, segment: Segment) -> list[pa.Buffer | None]:
        """Fill views of the columns as `BlockReader` does, and move the text vectors."""
        images = super()._fill(part, segment)
        if self.mean is not None or self.noise:
            has_text = part["text"].any(axis=1)
            vectors, uids = part["text"][has_text], part["uid"][has_text].tolist()
            part["text"][has_text] = self.move_vectors(vectors, segment.epoch, uids)
        return images

    def move_vectors(self, vectors: NDArray[np.float16], epoch: int, uids: list[str]) -> NDArray[np.float16]:
        """Unit vectors, less the mean and with noise, scaled to length 1 after each: float16 [n, D] to float16 [n, D]."""
        moved = vectors.astype(np.float32)
        if self.mean is not None:
            moved = normalise_rows(moved - self.mean)
        if self.noise:
            deviation = self.noise / np.sqrt(moved.shape[1])
            noise = [draw_normal(self.seed, epoch, uid, moved.shape[1]) for uid in uids]
            moved = normalise_rows(moved + deviation * np.reshape(noise, moved.shape))
        return moved.astype(np.float16)

    def text_column(self, table: pa.Table, name: str, location: str, segment: Segment) -> pa.ChunkedArray:
        """The captions, or vectors, of a segment's rows, some of them from other rows of the row group."""
        if not self.permuted:
            return table[name]
        shard, group = int(self.index.shard[segment.group]), int(self.index.group[segment.group])
        rows = int(self.index.rows[segment.group])
        sources = permute_captions(rows, self.permuted, self.seed, shard, group)
        column = self.read_rows(location, group, [name], Segment(segment.group, 0, rows))[name]
        return column.take(sources[segment.start : segment.stop])


def change_texts(
    reader: BlockReader, permuted: float = 0.0, mean: NDArray[np.float32] | None = None, noise: float = 0.0
) -> AblationReader:
    """The reader, but with changed texts."""
    settings = {field.name: getattr(reader, field.name) for field in fields(reader)}
    return AblationReader(**settings, permuted=permuted, mean=mean, noise=noise)


def count_used_rows(index: Index, share: float) -> NDArray[np.int64]:
    """The number of rows that a run uses of each row group, the first ones: int64 [G]."""
    return index.rows if share == 1 else np.floor(index.rows * share).astype(np.int64)


def normalise_rows(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows scaled to length 1."""
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), np.float32)


def draw_normal(seed: int, epoch: int, uid: str, width: int) -> NDArray[np.float32]:
    """Standard normal numbers for a row in an epoch (Box and Muller 1958), from bits that are the same in every NumPy release."""
    uniform = (_random_bits(f"{seed}/{epoch}/text/{uid}", 2 * width) >> np.uint64(11)) * 2.0**-53
    length, angle = np.sqrt(-2 * np.log1p(-uniform[:width])), 2 * np.pi * uniform[width:]
    return np.asarray(length * np.cos(angle), np.float32)


def permute_captions(rows: int, share: float, seed: int, shard: int, group: int) -> NDArray[np.int64]:
    """The row whose caption each row of a row group has: int64 [rows].

    About a share `share` of the rows exchange their captions, in the same way in every epoch. All other rows keep their own.
    """
    keys = _random_bits(f"{seed}/captions/{shard}/{group}", rows)
    chosen = np.flatnonzero(keys < np.uint64(min(share, 1 - 2.0**-53) * 2.0**64)) if share < 1 else np.arange(rows)
    order = chosen[np.argsort(keys[chosen], kind="stable")]
    sources = np.arange(rows)
    sources[order] = np.roll(order, 1)
    return sources


def _random_bits(key: str, count: int) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return np.random.PCG64(np.random.SeedSequence(int.from_bytes(digest, "little"))).random_raw(count)
