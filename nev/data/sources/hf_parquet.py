"""Reads image parquet: Hugging Face's (a struct of `bytes` and `path`) or img2dataset's (plain bytes and `status`).

The captions of a labelled set are templates with the class name, all in one list. Training draws one caption per epoch.
https://huggingface.co/docs/datasets/image_dataset, https://github.com/rom1504/img2dataset
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nev.config.base import ConfigError
from nev.data.column_types import NEEDED, as_labels, fits
from nev.data.index import KNOWN_NAMES
from nev.data.rows import Row
from nev.data.sources.common import (
    Source,
    SourceOptions,
    describe_options,
    fill_templates,
    group_files,
    input_file,
    parent_folder,
    relative_name,
    shared_folder,
)
from nev.data.sources.input_files import find_files
from nev.storage.files import filesystem, open_parquet

USUAL = {
    **KNOWN_NAMES,  # the usual names of shards' columns; the names below are those of foreign files
    "label": (*KNOWN_NAMES["label"], "labels", "fine_label"),
    "label_name": ("label_name",),
    "score": (),
    "status": ("status",),
}
OPTIONAL = (
    "label",
    "status",
)  # usual names count only with the right type: `class` is often text, `status` may be anything
BATCH_ROWS = 256


def source(inputs: Iterable[str | Path], options: SourceOptions) -> Source:
    """The source of the parquet files in `inputs`. A part is some whole files (see `read`).

    Raises ConfigError as `find_files` does.
    """
    unread = Counter[str]()
    files = find_files(inputs, (".parquet",), unread)
    root = shared_folder(parent_folder(file.location) for file in files)
    return Source(
        group_files(files, options.part_bytes),
        partial(read, root=root, options=options),
        sum(file.size for file in files),
        describe_options("hf-parquet", options, root=root),
        unread,
    )


def read(files: Iterable[str], root: str, options: SourceOptions) -> Iterator[Row]:
    """Yield one row for each parquet row, in the order of the files (paths or s3:// URLs).

    uid: the uid column, else '<file>-<row>', with the file's name relative to `root`.
    caption: the caption column, or `options.templates` with the class name.
    label_name: the column `options.label_name`, else the ClassLabel names in the file's metadata.

    A row whose `status` is not "success" is rejected with that status. Raises ConfigError for a file that is not readable, a
    missing column, or neither captions nor templates.
    """
    for path in files:
        with input_file(path, "readable as parquet"):
            yield from _read_file(path, relative_name(root, path.removesuffix(".parquet")), options)


def _read_file(path: str, stem: str, options: SourceOptions) -> Iterator[Row]:
    with open_parquet(*filesystem(path)) as raw, pq.ParquetFile(raw) as file:
        schema = file.schema_arrow
        if not file.metadata.num_rows:  # such as an empty frame of pandas, whose columns have no types
            return
        if twice := sorted(name for name, count in Counter(schema.names).items() if count > 1):
            raise ConfigError(f"{path}: column {twice[0]!r} stands twice. Rename or drop one of them")
        columns = _columns(schema, options, path)
        names = _class_names(schema, columns.get("label"))
        if missing := [name for name in options.extra if name not in schema.names]:
            raise ConfigError(f"{path}: no column {missing[0]!r} (columns: {schema.names})")
        if options.templates and "label_name" not in columns and not names:
            raise ConfigError(
                f"{path}: templates need class names: name their column with --name (columns: {schema.names})"
            )
        number = 0
        for batch in file.iter_batches(BATCH_ROWS, columns=sorted({*columns.values(), *options.extra})):
            values: dict[str, list[Any]] = {
                role: _values(batch, name, role, path if options.columns.label else None)
                for role, name in columns.items()
            }
            extra = {name: batch.column(name).to_pylist() for name in options.extra}
            for in_batch in range(batch.num_rows):
                cells = {role: column[in_batch] for role, column in values.items()}
                row = _row(cells, f"{stem}-{number:08d}", names, options.templates)
                row["source"] = f"{path}/{number}"
                yield {**row, "extra": {name: column[in_batch] for name, column in extra.items()}} if extra else row
                number += 1


def _row(cells: dict[str, Any], number: str, names: list[str], templates: tuple[str, ...]) -> Row:
    """cells: by role. number: the uid of a row without one. names: class names of the labels."""
    label: int | None = cells.get("label")
    name: str | None = cells.get("label_name")
    if name is None and label is not None and 0 <= label < len(names):
        name = names[label]
    caption: str | list[str] | None = cells.get("caption")
    if templates:
        caption = fill_templates(templates, name) if name else None
    row: Row = {
        "uid": str(cells["uid"]) if cells.get("uid") is not None else number,
        "image": cells["image"],
        "caption": caption,
        "label": label,
        "label_name": name,
    }
    if "score" in cells:
        row["score"] = cells["score"]
    if cells.get("status", "success") != "success":
        row["reject"] = f"status {cells['status']}"
    return row


def _columns(schema: pa.Schema, options: SourceOptions, path: str) -> dict[str, str]:
    """Column names of the file, by role. Raises ConfigError for a missing column that is named in the options, or needed."""
    wanted = {
        **options.columns.model_dump(),
        "label_name": options.label_name,
        "score": options.score,
        "status": None,
    }
    if options.templates:
        if wanted["caption"]:
            raise ConfigError(f"give a caption column ({wanted['caption']!r}) or templates, not both")
        del wanted["caption"]
    columns: dict[str, str] = {}
    for role, named in wanted.items():
        if named is not None and named not in schema.names:
            option = "--name" if role == "label_name" else f"--{role}"
            raise ConfigError(f"{path}: no column {named!r} (columns: {schema.names}). Name one of these with {option}")
        usual = [
            name
            for name in USUAL[role]
            if name in schema.names and (role not in OPTIONAL or fits(role, schema.field(name).type))
        ]
        name = named or next(iter(usual), None)
        if name is None and (role == "image" or (role == "caption" and options.captioned)):
            also = ", or make captions from class names with --template 'a photo of a {}.'" if role == "caption" else ""
            raise ConfigError(f"{path}: no {role} column (columns: {schema.names}). Name it with --{role}{also}")
        if name is not None:
            columns[role] = name
    for role, name in columns.items():
        if not fits(role, schema.field(name).type):
            raise ConfigError(
                f"{path}: column {name!r} cannot be the {role}: it is {schema.field(name).type}, and {NEEDED[role]} is needed"
            )
    return columns


def _values(batch: pa.RecordBatch, name: str, role: str, where: str | None) -> list[Any]:
    """The values of a column. where: the file, for a label that the user has named and that is no whole number."""
    column = batch.column(name)
    if role == "image" and pa.types.is_struct(column.type):
        cells: list[Any] = [image and image["bytes"] for image in column.to_pylist()]
        return cells
    values: list[Any] = column.to_pylist()
    return as_labels(values, where) if role == "label" else values


def _class_names(schema: pa.Schema, label: str | None) -> list[str]:
    """The names of a ClassLabel feature, which `datasets` stores as JSON in the metadata of the file."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        names = features[label]["names"]
    except (ValueError, KeyError, TypeError):
        return []
    return [str(name) for name in names]
