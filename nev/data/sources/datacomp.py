"""Reads DataComp: image tars as its downloader (img2dataset) writes them, joined by uid with the metadata parquet.

The metadata have the caption (`text`) and the score, in columns as in https://github.com/mlfoundations/datacomp. A DFN is a list
of uids over the same tars, and so a filter (`nev.data.prepare.filters`). The metadata are read once and shared by all tasks. In
memory they take 24 bytes a row and the length of the captions, and up to four times that while they are sorted. Where memory is
too small, prepare some of the tars at a time, with their metadata alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nev.config.base import ConfigError
from nev.data.column_types import fits
from nev.data.rows import Row
from nev.data.sources import webdataset
from nev.data.sources.common import Source, SourceOptions, describe_options, group_files, hash_content, input_file
from nev.data.sources.input_files import find_files
from nev.data.uids import BATCH_ROWS, Keys, find_uid, hash_uids
from nev.storage.files import filesystem, open_parquet

CAPTIONS = ("text", "caption")


class Metadata(NamedTuple):
    """The metadata of n rows, sorted by key.

    keys: bytes [n].
    texts: captions [n].
    scores: float64 [n]. None where no score is needed.
    """

    keys: Keys
    texts: pa.LargeStringArray
    scores: pa.DoubleArray | None


def source(inputs: Iterable[str | Path], options: SourceOptions) -> Source:
    """The source of the tars in `inputs`. A part is some whole tars (see `read`). The metadata are read here.

    Raises ConfigError for metadata that are missing, not readable, or without the columns, and as `find_files` does.
    """
    unread = Counter[str]()
    tars = find_files(inputs, webdataset.SUFFIXES, unread)
    if not options.metadata:
        raise ConfigError("a DataComp source needs its metadata parquet (--metadata), which has the captions")
    files = find_files(options.metadata, (".parquet",))
    return Source(
        group_files(tars, options.part_bytes),
        partial(read, metadata=_load([file.location for file in files], options), options=options),
        sum(file.size for file in tars),
        describe_options("datacomp", options, metadata_files=hash_content(files)),
        unread,
    )


def read(tars: Iterable[str], metadata: Metadata, options: SourceOptions) -> Iterator[Row]:
    """Yield one row for each key of the tars, with the caption and score of its uid in the metadata.

    A uid that is not in the metadata is rejected. Raises ConfigError as `webdataset.read` does.
    """
    plain = options.model_copy(
        update={"score": None, "captioned": False, "columns": options.columns.model_copy(update={"caption": None})}
    )
    for row in webdataset.read(tars, plain):
        if "reject" in row:
            yield row
        elif (position := find_uid(metadata.keys, row["uid"])) is None:
            yield {**row, "reject": "uid not in the metadata"}
        else:
            score = None if metadata.scores is None else metadata.scores[position].as_py()
            try:
                yield {**row, "caption": metadata.texts[position].as_py(), "score": score}
            except UnicodeDecodeError:
                yield {**row, "reject": "caption not in UTF-8"}


def _load(files: list[str], options: SourceOptions) -> Metadata:
    keys, tables = [], []
    for path in files:
        with (
            input_file(path, "readable as metadata parquet"),
            open_parquet(*filesystem(path)) as raw,
            pq.ParquetFile(raw) as file,
        ):
            uid, *names = _columns(file.schema_arrow, options, path)
            for batch in file.iter_batches(BATCH_ROWS, columns=[uid, *names]):
                keys.append(hash_uids([value or "" for value in batch.column(uid).to_pylist()]))
                kinds = (pa.large_string(), pa.float64())
                columns = [pc.cast(batch.column(name), kind) for name, kind in zip(names, kinds, strict=False)]
                tables.append(pa.table(columns, names=["text", "score"][: len(names)]))
    if not tables:
        raise ConfigError(f"{files[0]}: the metadata have no rows")
    all_keys = np.concatenate(keys)
    order = np.argsort(all_keys, kind="stable")  # stable: of equal uids `find_uid` returns the first
    table = pa.concat_tables(tables).take(pa.array(order)).combine_chunks()
    scores = table.column("score").chunk(0) if "score" in table.column_names else None
    return Metadata(all_keys[order], table.column("text").chunk(0), scores)


def _columns(schema: pa.Schema, options: SourceOptions, path: str) -> list[str]:
    """The column names of uid, caption and, with `options.score`, score. Raises ConfigError for a missing or unfit column."""
    roles: list[tuple[str, tuple[str, ...]]] = [
        ("uid", (options.columns.uid or "uid",)),
        ("caption", (options.columns.caption,) if options.columns.caption else CAPTIONS),
        *([("score", (options.score,))] if options.score else []),
    ]
    columns = []
    for role, names in roles:
        name = next((name for name in names if name in schema.names), None)
        if name is None:
            raise ConfigError(f"{path}: no {role} column {' or '.join(map(repr, names))} (columns: {schema.names})")
        kind = schema.field(name).type
        if not fits("score" if role == "score" else "label_name", kind):  # uids and captions are strings here
            raise ConfigError(f"{path}: column {name!r} cannot be the {role}: it is {kind}")
        columns.append(name)
    return columns
