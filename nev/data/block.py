"""From the rows of the plan to arrays: read, decode, augment, attach the text vectors. No Ray in it.

A row that cannot be used stays in the block, with `valid` False and the reason. So a block always has R rows.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nev.config.data import Augment, Limits
from nev.data.augment import eval_view, seeded_fractions, seeded_random, train_view
from nev.data.column_types import as_labels
from nev.data.decode import BadImage, read_header
from nev.data.image_sidecar import Features
from nev.data.index import Index
from nev.data.plan import Segment
from nev.data.rows import parse_captions
from nev.data.sidecar import decode_vectors, read_uid_column
from nev.data.text_sidecar import text_sidecars
from nev.storage.files import filesystem, is_local, open_parquet
from nev.storage.reading import DataError, read_errors_as_data_errors

if TYPE_CHECKING:
    from nev.data.tokens import CaptionTokenizer

OPEN_FILES = 32

Block = dict[str, NDArray[Any]]


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
    _files: OrderedDict[str, tuple[Any, pq.FileMetaData]] = field(default_factory=OrderedDict, repr=False)

    @property
    def row_bytes(self) -> int:
        """Bytes of the arrays of a row: the picture or its features, and the vector or token ids of its text."""
        return self.allocate(1).nbytes + (4 * self.tokenizer.width if self.tokenizer else 2 * self.text_width)

    def allocate(self, rows: int) -> NDArray[Any]:
        """Memory for the column `image` of a block of `rows` rows, not initialised."""
        if self.features:
            return np.empty((rows, *self.features.shape), np.float16)
        return allocate_block(rows, self.image_size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def read(self, segments: list[Segment], epoch: int, pictures: NDArray[Any] | None = None) -> Block:
        """Read the rows of the segments, R in all, in order. Raises DataError.

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
        total = sum(segment.stop - segment.start for segment in segments)
        block: Block = {
            "image": self.allocate(total) if pictures is None else pictures,
            "valid": np.ones(total, np.bool_),
            "uid": np.empty(total, object),
            "reason": np.full(total, "", object),
            "shard": np.empty(total, np.int32),
            "row_group": np.empty(total, np.int32),
            "row": np.empty(total, np.int32),
        }
        if self.tokenizer:
            block["text"] = np.full((total, self.tokenizer.width), -1, np.int32)
        elif self.text_key:
            block["text"] = np.zeros((total, self.text_width), np.float16)
        if self.with_labels:
            block["label"] = np.full(total, -1, np.int64)
        row = 0
        for segment in segments:
            count = segment.stop - segment.start
            self._fill({name: column[row : row + count] for name, column in block.items()}, segment, epoch)
            row += count
        return block

    def _fill(self, part: Block, segment: Segment, epoch: int) -> None:
        """Fill views of the block with one segment."""
        shard, group = int(self.index.shard[segment.group]), int(self.index.group[segment.group])
        columns, location = self.index.columns, self.index.location(shard)
        part["shard"][:], part["row_group"][:] = shard, group
        part["row"][:] = np.arange(segment.start, segment.stop)
        if self.features:
            self._fill_features(part, shard, group, segment, epoch, self.features)
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
            self._fill_tokens(part, captions, epoch, self.tokenizer)
        elif self.text_key:
            self._fill_vectors(part, shard, group, segment, epoch)
        if not self.features:
            self._fill_pictures(part, _image_bytes(table[columns.image]), epoch)
        part["image"][~part["valid"]] = 0

    def _fill_pictures(self, part: Block, column: pa.ChunkedArray, epoch: int) -> None:
        """Fill in the decoded pictures of the rows that are valid so far."""
        for row, value in enumerate(column):
            try:
                if part["valid"][row]:
                    self._decode_picture(value, part["uid"][row], epoch, part["image"][row])
            except BadImage as error:
                part["valid"][row], part["reason"][row] = False, str(error)

    def _fill_features(
        self, part: Block, shard: int, group: int, segment: Segment, epoch: int, features: Features
    ) -> None:
        """Fill in the uids, and the features of one view of each picture."""
        location = features.sidecars(self.index).location(shard)
        table = self.read_rows(location, group, ["uid", "features", "reason"], segment)
        uids = read_uid_column(table["uid"])
        part["uid"][:] = uids
        vectors, starts = decode_vectors(table["features"], features.numbers)
        has_features = np.diff(starts) > 0
        view = features.draw_views(self.seed, epoch, uids)
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

    def _fill_vectors(self, part: Block, shard: int, group: int, segment: Segment, epoch: int) -> None:
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
        chosen = self._choose_captions(part, counts, epoch)
        has_text = _mark_captions(part, counts)
        part["text"][has_text] = vectors[(starts[:-1] + chosen)[has_text]]

    def _decode_picture(self, value: pa.Scalar, uid: str, epoch: int, out: NDArray[np.uint8]) -> None:
        buffer = value.as_buffer()
        if buffer is None:
            raise BadImage("image is null")
        image = read_header(memoryview(buffer).cast("B"), self.limits)
        if self.augment is None:
            eval_view(image, out)
        else:
            train_view(image, out, self.augment, seeded_random(self.seed, epoch, uid, "augment"))

    def text_column(self, table: pa.Table, name: str, location: str, segment: Segment) -> pa.ChunkedArray:
        """The captions, or vectors, of a segment's rows. `nev.data.ablation` overrides this.

        table: the segment's rows in the file at `location`.
        """
        return table[name]

    def read_rows(self, location: str, group: int, columns: list[str], segment: Segment) -> pa.Table:
        """Columns of a segment's rows. group: number of the row group in the file. Raises DataError."""
        with read_errors_as_data_errors(
            f"{location}: row group {group}", "Write this file again, or remove it and start again."
        ):
            table = self._file(location).read_row_group(group, columns, use_threads=False)
        if len(table) < segment.stop:
            raise DataError(f"{location}: row group {group} has lost rows since it was indexed. Start again.")
        return table.slice(segment.start, segment.stop - segment.start)

    def _file(self, location: str) -> pq.ParquetFile:
        """A reader of an open file, with the footer that was parsed at first use. The least recently used files are closed.

        Each call makes a new reader: with `pre_buffer` a reader keeps all bytes that it has read.
        """
        if location in self._files:
            self._files.move_to_end(location)
        else:
            fs, path = filesystem(location)
            source = pa.memory_map(path) if is_local(fs) else open_parquet(fs, path)
            self._files[location] = source, pq.read_metadata(source)
            while len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)[1][0].close()
        source, footer = self._files[location]
        return pq.ParquetFile(source, metadata=footer, pre_buffer=not isinstance(source, pa.MemoryMappedFile))


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
