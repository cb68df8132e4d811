"""From the rows of the plan to arrays: read, decode, augment, attach the text vectors. No Ray in it.

A row that cannot be used stays in the block, with `valid` False and the reason. So a block always has R rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nev.config.data import Augment, Limits
from nev.data.augment import eval_view, seeded_fractions, seeded_random, train_view
from nev.data.block_plan import Segment, Window
from nev.data.column_types import as_labels
from nev.data.decode import BadImage, read_header
from nev.data.image_sidecar import Features
from nev.data.index import Index
from nev.data.rows import parse_captions
from nev.data.shard_files import ShardFiles, map_by_file
from nev.data.sidecar import decode_vectors, read_uid_column
from nev.data.text_sidecar import text_sidecars

if TYPE_CHECKING:
    from nev.data.tokens import CaptionTokenizer

Block = dict[str, NDArray[Any]]
EVERY_ROW = slice(None)


class EncodedRows(NamedTuple):
    """Rows that are read, n of them, with pictures that are not decoded yet.

    columns: the columns of a block, but `image` (though with it for a reader of features).
    epochs: int32 [n], the epoch of each row.
    images: n encoded pictures, null where a row has none; empty for a reader of features.
    """

    columns: Block
    epochs: NDArray[np.int32]
    images: list[pa.Buffer | None]


@dataclass(frozen=True)
class BlockReader:
    """Reads rows as arrays.

    index: the row groups of the set.
    image_size: S, side of the square pictures, in pixels.
    limits: largest and smallest encoded image.
    seed: seed of augmentation and of the choice among several captions.
    augment: augmentation of training. None: the evaluation view.
    text_key: key of the sidecars whose vectors are the text. None: no vectors.
    text_width: D, width of these vectors.
    tokenizer: makes token ids of captions, which are the text instead of vectors. None: no token ids.
    with_labels: read the class labels.
    features: what is read of image sidecars in the place of pictures, which are not opened. None: pictures.
    """

    index: Index
    image_size: int
    limits: Limits
    seed: int
    augment: Augment | None
    text_key: str | None = None
    text_width: int = 0
    tokenizer: CaptionTokenizer | None = None
    with_labels: bool = False
    features: Features | None = None
    _files: ShardFiles = field(default_factory=ShardFiles, repr=False)

    @property
    def row_bytes(self) -> int:
        """Bytes of the arrays of a row: the picture or its features, and the vector or token ids of its text."""
        return self.allocate(1).nbytes + (4 * self.tokenizer.width if self.tokenizer else 2 * self.text_width)

    def allocate(self, rows: int) -> NDArray[Any]:
        """Memory for the column `image` of a block of `rows` rows, not initialised."""
        if self.features:
            return np.empty((rows, *self.features.shape), np.float16)
        return allocate_block(rows, self.image_size)

    def read(self, segments: list[Segment]) -> Block:
        """Read and decode the rows of the segments, in order, as one block: see `decode`. Raises DataError."""
        return self.decode(self.load(segments))

    def read_blocks(self, window: Window, pictures: NDArray[Any] | None = None) -> Iterator[Block]:
        """The blocks of a window, in order. Its rows are read once, before the first block. Raises DataError.

        pictures: memory of `allocate(R)`, which each block overwrites. None: new memory for each block.
        """
        rows = self.load(window.segments)
        for chosen in window.order.reshape(window.blocks, -1):
            yield self.decode(rows, chosen, pictures)

    def load(self, segments: list[Segment]) -> EncodedRows:
        """Read the rows of the segments, n in all, in order. Raises DataError."""
        total = sum(segment.stop - segment.start for segment in segments)
        columns: Block = {
            "valid": np.ones(total, np.bool_),
            "uid": np.empty(total, object),
            "reason": np.full(total, "", object),
            "shard": np.empty(total, np.int32),
            "row_group": np.empty(total, np.int32),
            "row": np.empty(total, np.int32),
        }
        if self.features:
            columns["image"] = self.allocate(total)
        if self.tokenizer:
            columns["text"] = np.full((total, self.tokenizer.width), -1, np.int32)
        elif self.text_key:
            columns["text"] = np.zeros((total, self.text_width), np.float16)
        if self.with_labels:
            columns["label"] = np.full(total, -1, np.int64)
        counts = [segment.stop - segment.start for segment in segments]
        ends = np.cumsum(counts).tolist()

        def fill(position: int) -> list[pa.Buffer | None]:
            place = slice(ends[position] - counts[position], ends[position])
            return self._fill({name: column[place] for name, column in columns.items()}, segments[position])

        files = [self.index.file_of(segment.group) for segment in segments]
        images = list(chain.from_iterable(map_by_file(fill, range(len(segments)), files)))
        return EncodedRows(columns, np.repeat([segment.epoch for segment in segments], counts).astype(np.int32), images)

    def decode(
        self,
        rows: EncodedRows,
        chosen: Any = EVERY_ROW,
        pictures: NDArray[Any] | None = None,
    ) -> Block:
        """The block of the chosen rows, R in all.

        chosen: positions in `rows`, int64 [R] or a slice.
        pictures: memory of `allocate(R)`, which is overwritten. None: new memory.

        The block has these columns:
        image: uint8 [R, S, S, 3], or float16 [R, *features.shape]; 0 where not valid.
        text: float16 [R, D], or int32 [R, T] with -1 after the end; absent for a reader without text.
        valid: bool [R].
        uid: str [R].
        reason: str [R], why a row is not valid; empty where valid.
        shard, row_group, row: int32 [R], number of the shard, of the row group in the shard, and of the row in the row group.
        label: int64 [R], -1 where there is none; only with `with_labels`.
        """
        block: Block = {name: column[chosen] for name, column in rows.columns.items() if name != "image"}
        block["valid"], block["reason"] = block["valid"].copy(), block["reason"].copy()  # decoding changes them
        if self.features:
            stored = rows.columns["image"]
            block["image"] = stored[chosen] if pictures is None else np.take(stored, chosen, axis=0, out=pictures)
        else:
            positions = np.arange(len(rows.images))[chosen]
            block["image"] = self.allocate(len(positions)) if pictures is None else pictures
            images = [rows.images[position] for position in positions.tolist()]
            self._decode_pictures(block, images, rows.epochs[chosen].tolist())
        block["image"][~block["valid"]] = 0
        return block

    def _decode_pictures(self, block: Block, images: list[pa.Buffer | None], epochs: list[int]) -> None:
        """Decode the pictures of the rows that are valid so far."""
        for row, (image, epoch) in enumerate(zip(images, epochs, strict=True)):
            try:
                if block["valid"][row]:
                    self._decode_picture(image, block["uid"][row], epoch, block["image"][row])
            except BadImage as error:
                block["valid"][row], block["reason"][row] = False, str(error)

    def _decode_picture(self, buffer: pa.Buffer | None, uid: str, epoch: int, out: NDArray[np.uint8]) -> None:
        if buffer is None:
            raise BadImage("image is null")
        image = read_header(memoryview(buffer).cast("B"), self.limits)
        if self.augment is None:
            eval_view(image, out)
        else:
            train_view(image, out, self.augment, seeded_random(self.seed, epoch, uid, "augment"))

    def _fill(self, part: Block, segment: Segment) -> list[pa.Buffer | None]:
        """Fill views of the columns with one segment. Returns its encoded pictures."""
        shard, group = int(self.index.shard[segment.group]), int(self.index.group[segment.group])
        columns, location = self.index.columns, self.index.location(shard)
        part["shard"][:], part["row_group"][:] = shard, group
        part["row"][:] = np.arange(segment.start, segment.stop)
        if self.features:
            self._fill_features(part, shard, group, segment, self.features)
        names = [
            columns.label if self.with_labels else None,
            columns.caption if self.tokenizer else None,
            None if self.features else columns.image,
        ]
        if any(names):
            table = self.read_rows(location, group, [name for name in (columns.uid, *names) if name], segment)
            uids = read_uid_column(table[columns.uid])
            if self.features and uids != part["uid"].tolist():
                raise self.features.sidecars(self.index).misaligned(shard)
            part["uid"][:] = uids
        if self.with_labels and columns.label and columns.label in table.column_names:
            labels = as_labels(table[columns.label].to_pylist())
            part["label"][:] = [-1 if label is None else label for label in labels]
        if self.tokenizer:
            captions = self.text_column(table, str(columns.caption), location, segment)
            self._fill_tokens(part, captions, segment.epoch, self.tokenizer)
        elif self.text_key:
            self._fill_vectors(part, shard, group, segment)
        if self.features:
            return []
        if tar := self.index.tars[shard]:
            return list(self._files.read_pictures(tar, table[columns.image]))
        return [value.as_buffer() for value in _image_bytes(table[columns.image])]

    def _fill_features(self, part: Block, shard: int, group: int, segment: Segment, features: Features) -> None:
        """Fill in the uids, and the features of one view of each picture."""
        location = features.sidecars(self.index).location(shard)
        table = self.read_rows(location, group, ["uid", "features", "reason"], segment)
        uids = read_uid_column(table["uid"])
        part["uid"][:] = uids
        vectors, starts = decode_vectors(table["features"], features.numbers)
        has_features = np.diff(starts) > 0
        view = features.draw_views(self.seed, segment.epoch, uids)
        chosen = vectors[(starts[:-1] + view)[has_features]]
        part["image"][has_features] = chosen.reshape(-1, *features.shape)
        if not has_features.all():
            part["valid"][:] = has_features
            part["reason"][:] = table["reason"].to_pylist()

    def _fill_tokens(self, part: Block, column: pa.ChunkedArray, epoch: int, tokenizer: CaptionTokenizer) -> None:
        """Fill in the token ids of one caption per row."""
        captions = [parse_captions(value) for value in column.to_pylist()]
        counts = np.array([len(row_captions) for row_captions in captions])
        chosen = self._choose_captions(part, counts, epoch)
        has_text = _mark_captions(part, counts)
        sentences = [
            row_captions[number] for row_captions, number in zip(captions, chosen, strict=True) if row_captions
        ]
        if sentences:
            part["text"][has_text] = tokenizer(sentences)

    def _choose_captions(self, part: Block, counts: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """The number of the caption of each row, drawn by (seed, epoch, uid) where a row has several captions."""
        if not (counts > 1).any():
            return np.zeros(len(counts), np.int64)
        fractions = seeded_fractions(self.seed, epoch, part["uid"].tolist(), "caption")
        return (np.array(fractions) * counts).astype(np.int64)

    def _fill_vectors(self, part: Block, shard: int, group: int, segment: Segment) -> None:
        """Fill in the vector of one caption per row."""
        assert self.text_key
        sidecars = text_sidecars(self.index, self.text_key, self.text_width)
        location = sidecars.location(shard)
        table = self.read_rows(location, group, ["uid", "vectors"], segment)
        if read_uid_column(table["uid"]) != part["uid"].tolist():
            raise sidecars.misaligned(shard)
        column = self.text_column(table, "vectors", location, segment)
        vectors, starts = decode_vectors(column, self.text_width)
        counts = np.diff(starts)
        chosen = self._choose_captions(part, counts, segment.epoch)
        has_text = _mark_captions(part, counts)
        part["text"][has_text] = vectors[(starts[:-1] + chosen)[has_text]]

    def text_column(self, table: pa.Table, name: str, location: str, segment: Segment) -> pa.ChunkedArray:
        """The captions, or vectors, of a segment's rows. `nev.data.ablation` overrides this.

        table: the segment's rows in the file at `location`.
        """
        return table[name]

    def read_rows(self, location: str, group: int, columns: list[str], segment: Segment) -> pa.Table:
        """Columns of a segment's rows. group: number of the row group in the file. Raises DataError."""
        return self._files.read(location, group, columns, segment.start, segment.stop, self.index.object_info(location))


def allocate_block(rows: int, size: int) -> NDArray[np.uint8]:
    """Memory for the pictures of a block: uint8 [rows, size, size, 3], not initialised."""
    return np.empty((rows, size, size, 3), np.uint8)


def _mark_captions(part: Block, counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark rows without a caption as not valid. Returns which rows have a caption, bool [rows]."""
    has_text: NDArray[np.bool_] = counts > 0
    part["valid"][~has_text] = False
    part["reason"][~has_text] = "caption is empty"
    return has_text


def _image_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The encoded images of a column that is binary, or the Hugging Face struct with `bytes`. The index has checked the type."""
    if not pa.types.is_struct(column.type):
        return column
    import pyarrow.compute as pc

    return pc.struct_field(column, "bytes")
