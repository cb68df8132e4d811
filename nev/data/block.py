"""From the rows that the plan names to arrays: read, decode, augment, attach the text vectors. No Ray in it.

A row that cannot be used stays as a row with `valid` False and its reason, so that a block has its R rows always.
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
from nev.data.augment import draw, eval_view, train_view
from nev.data.decode import BadImage, read_header
from nev.data.index import Index
from nev.data.plan import Segment
from nev.data.rows import parse_captions
from nev.data.sidecar import decode_vectors, misaligned_error, read_uid_column, sidecar_location
from nev.storage.files import filesystem, is_local, open_parquet
from nev.storage.reading import DataError, read_errors_as_data_errors

if TYPE_CHECKING:
    from nev.data.tokens import Tokens

OPEN_FILES = 32

Block = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class BlockReader:
    """How rows become arrays. `augment` None is the evaluation view. text is a sidecar's vectors under `text_key`, or
    token ids by `tokens`, or left out.
    """

    index: Index
    image_size: int
    limits: Limits
    seed: int
    augment: Augment | None
    text_key: str | None = None
    text_width: int = 0
    tokens: Tokens | None = None
    with_labels: bool = False
    _files: OrderedDict[str, tuple[Any, pq.FileMetaData]] = field(default_factory=OrderedDict, repr=False)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's arrays: the picture, and the text's vector or tokens."""
        return self.image_size**2 * 3 + (4 * self.tokens.width if self.tokens else 2 * self.text_width)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def read(self, segments: list[Segment], epoch: int, pictures: NDArray[np.uint8] | None = None) -> Block:
        """Read rows in order, R of them in all. pictures: memory for them, uint8 [R, S, S, 3], written over; new if None.

        image: uint8 [R, S, S, 3], 0 where not valid; text: float16 [R, D] or int32 [R, T], -1 after the end; valid: bool [R];
        uid, reason: str [R] (reason is empty where valid); shard, row_group (in the shard), row (in the row group): int32 [R];
        with_labels adds label: int64 [R].
        """
        total = sum(segment.stop - segment.start for segment in segments)
        if pictures is None:
            pictures = allocate_block(total, self.image_size)
        block: Block = {
            "image": pictures,
            "valid": np.ones(total, np.bool_),
            "uid": np.empty(total, object),
            "reason": np.full(total, "", object),
            "shard": np.empty(total, np.int32),
            "row_group": np.empty(total, np.int32),
            "row": np.empty(total, np.int32),
        }
        if self.tokens:
            block["text"] = np.full((total, self.tokens.width), -1, np.int32)
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
        more = (columns.label if self.with_labels else None, columns.caption if self.tokens else None)
        names = [name for name in (columns.uid, columns.image, *more) if name]
        table = self.read_rows(location, group, names, segment)
        part["shard"][:], part["row_group"][:] = shard, group
        part["row"][:] = np.arange(segment.start, segment.stop)
        part["uid"][:] = read_uid_column(table[columns.uid])
        if self.with_labels and columns.label:
            part["label"][:] = [-1 if label is None else label for label in table[columns.label].to_pylist()]
        if self.tokens:
            captions = self.text_column(table, str(columns.caption), location, segment)
            self._fill_tokens(part, captions, epoch, self.tokens)
        elif self.text_key:
            self._fill_vectors(part, shard, group, segment, epoch)
        for row, value in enumerate(_encoded(table[columns.image])):
            try:
                if part["valid"][row]:
                    self._view(value, part["uid"][row], epoch, part["image"][row])
            except BadImage as bad:
                part["valid"][row], part["reason"][row] = False, str(bad)
        part["image"][~part["valid"]] = 0

    def _fill_tokens(self, part: Block, column: pa.ChunkedArray, epoch: int, tokens: Tokens) -> None:
        """One caption's tokens a row."""
        captions = [parse_captions(value) for value in column.to_pylist()]
        counts = np.array([len(of_row) for of_row in captions])
        chosen = self._drawn(part, counts, epoch)
        has_text = _captioned(part, counts)
        sentences = [of_row[which] for of_row, which in zip(captions, chosen, strict=True) if of_row]
        if sentences:
            part["text"][has_text] = tokens(sentences)

    def _drawn(self, part: Block, counts: NDArray[np.int64], epoch: int) -> list[int]:
        """The number of each row's caption, drawn by (seed, epoch, uid) where there are several."""
        return [
            int(draw(self.seed, epoch, uid, "caption").random() * count) if count > 1 else 0
            for uid, count in zip(part["uid"], counts.tolist(), strict=True)
        ]

    def _fill_vectors(self, part: Block, shard: int, group: int, segment: Segment, epoch: int) -> None:
        """One caption's vector a row."""
        assert self.text_key
        location = sidecar_location(self.index, shard, self.text_key)
        table = self.read_rows(location, group, ["uid", "vectors"], segment)
        if read_uid_column(table["uid"]) != part["uid"].tolist():
            raise misaligned_error(location)
        column = self.text_column(table, "vectors", location, segment)
        vectors, starts = decode_vectors(column, self.text_width)
        counts = np.diff(starts)
        chosen = self._drawn(part, counts, epoch)
        has_text = _captioned(part, counts)
        part["text"][has_text] = vectors[(starts[:-1] + chosen)[has_text]]

    def _view(self, value: pa.Scalar, uid: str, epoch: int, out: NDArray[np.uint8]) -> None:
        buffer = value.as_buffer()
        if buffer is None:
            raise BadImage("image is null")
        image = read_header(memoryview(buffer).cast("B"), self.limits)
        if self.augment is None:
            eval_view(image, out)
        else:
            train_view(image, out, self.augment, draw(self.seed, epoch, uid, "augment"))

    def text_column(self, table: pa.Table, name: str, location: str, segment: Segment) -> pa.ChunkedArray:
        """The captions, or vectors, of a segment's rows. table: the segment's rows in the file at `location`."""
        return table[name]

    def read_rows(self, location: str, group: int, columns: list[str], segment: Segment) -> pa.Table:
        """Columns of a segment's rows. group: number of the row group in the file. Raises DataError."""
        with read_errors_as_data_errors(
            f"{location}: row group {group}", "Write this file again, or remove it and start anew."
        ):
            table = self._file(location).read_row_group(group, columns, use_threads=False)
        if len(table) < segment.stop:
            raise DataError(f"{location}: row group {group} has lost rows since it was indexed. Start again.")
        return table.slice(segment.start, segment.stop - segment.start)

    def _file(self, location: str) -> pq.ParquetFile:
        """The file with its footer as it was parsed at first use. The least recently used ones are closed.

        A new reader each time: one that reads ahead (`pre_buffer`, a request for each row group) keeps what it has read.
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
    """Memory for the pictures of a block: uint8 [rows, size, size, 3], with anything in it."""
    return np.empty((rows, size, size, 3), np.uint8)


def _captioned(part: Block, counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows have a caption; the others are left out of the loss."""
    has_text: NDArray[np.bool_] = counts > 0
    part["valid"][~has_text] = False
    part["reason"][~has_text] = "caption is empty"
    return has_text


def _encoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The bytes of an image column: binary, or the Hugging Face struct with `bytes` (the index has checked that)."""
    if not pa.types.is_struct(column.type):
        return column
    import pyarrow.compute as pc

    return pc.struct_field(column, "bytes")
