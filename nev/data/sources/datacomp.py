"""Read DataComp: image tars as its downloader (img2dataset) writes them, joined by uid with the metadata parquet.

The metadata give the caption (`text`) and the score; columns as in https://github.com/mlfoundations/datacomp. A DFN is a
list of uids over the same tars: a filter (`nev.data.prepare.filters`). The metadata are read once and shared by all tasks. In
memory they take 24 bytes a row and the captions' own length, as arrays, and up to four times that while they are sorted; where
that is too much, prepare some of the tars at a time, each time with their own metadata.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nev.config.base import ConfigError
from nev.data.rows import Row
from nev.data.sources import webdataset
from nev.data.sources.common import (
    Source,
    SourceOptions,
    describe_options,
    find_files,
    group_files,
    hash_content,
    input_file,
)
from nev.data.uids import BATCH_ROWS, Keys, find_uid, hash_uids
from nev.storage.files import filesystem, open_parquet

CAPTIONS = ("text", "caption")


class Metadata(NamedTuple):
    """What the join needs: keys [n], sorted, and in the same order texts [n] and, where a score is asked for, scores [n]."""

    keys: Keys
    texts: pa.LargeStringArray
    scores: pa.DoubleArray | None


def source(inputs: Iterable[str | Path], options: SourceOptions) -> Source:
    """The tars that `inputs` name, in parts of whole tars (see `read`), and the metadata, which are read here.

    Raises ConfigError for metadata that are missing, not readable, or without the columns, and as `find_files` does.
    """
    tars = find_files(inputs, webdataset.SUFFIXES)
    if not options.metadata:
        raise ConfigError("a DataComp source needs its metadata parquet (--metadata): they hold the captions")
    files = find_files(options.metadata, (".parquet",))
    return Source(
        group_files(tars, options.part_bytes),
        partial(read, metadata=_load([file.location for file in files], options), options=options),
        sum(file.size for file in tars),
        describe_options("datacomp", options, metadata_files=hash_content(files)),
    )


def read(tars: Iterable[str], metadata: Metadata, options: SourceOptions) -> Iterator[Row]:
    """Yield one row a key of the tars, with the caption and score that the metadata have for its uid.

    A uid that the metadata lack is rejected. Raises ConfigError as `webdataset.read` does.
    """
    for row in webdataset.read(tars, options.model_copy(update={"score": None})):
        if "reject" in row:
            yield row
        elif (at := find_uid(metadata.keys, row["uid"])) is None:
            yield {**row, "reject": "uid not in the metadata"}
        else:
            score = None if metadata.scores is None else metadata.scores[at].as_py()
            try:
                yield {**row, "caption": metadata.texts[at].as_py(), "score": score}
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
    every = np.concatenate(keys)
    order = np.argsort(every, kind="stable")  # stable: of equal uids `find_uid` gives the first
    table = pa.concat_tables(tables).take(pa.array(order)).combine_chunks()
    scores = table.column("score").chunk(0) if "score" in table.column_names else None
    return Metadata(every[order], table.column("text").chunk(0), scores)


def _columns(schema: pa.Schema, options: SourceOptions, path: str) -> list[str]:
    """The names of uid, text and, where it is asked for, score."""
    wanted: list[tuple[str, tuple[str, ...]]] = [
        ("uid", (options.columns.uid or "uid",)),
        ("caption", (options.columns.caption,) if options.columns.caption else CAPTIONS),
        *([("score", (options.score,))] if options.score else []),
    ]
    found = []
    for role, names in wanted:
        name = next((name for name in names if name in schema.names), None)
        if name is None:
            raise ConfigError(f"{path}: no {role} column {' or '.join(map(repr, names))} (columns: {schema.names})")
        kind = schema.field(name).type
        if not (pa.types.is_floating(kind) if role == "score" else kind in (pa.string(), pa.large_string())):
            raise ConfigError(f"{path}: column {name!r} can't be the {role}: it is {kind}")
        found.append(name)
    return found
