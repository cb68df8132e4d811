"""Files of texts for an index: parquet or JSON lines, with the columns `uid` and `text`."""

from __future__ import annotations

import json
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nev.search.store import SearchError, refuse_twice
from nev.storage.files import filesystem, open_parquet, storage_errors_as


class Texts(NamedTuple):
    """Texts by their uids. empty: rows that were left out, since their text is null or blank."""

    uids: list[str]
    texts: list[str]
    empty: int


def read_texts(location: str) -> Texts:
    """Read a file of texts, `.parquet` or `.jsonl`, here or on S3. Raises SearchError for another form, and for a uid twice."""
    if not location.endswith((".parquet", ".jsonl")):
        raise SearchError(f"{location}: a file of texts is .parquet or .jsonl, with uid and text in each row")
    fs, path = filesystem(location)
    with storage_errors_as(location, "read", "Write the file again.", SearchError):
        if location.endswith(".parquet"):
            with open_parquet(fs, path) as file:
                rows = _read_parquet(file, location)
        else:
            rows = _read_lines(fs.cat_file(path), location)
    uids = [uid for uid, text in rows if text and text.strip()]
    refuse_twice(uids, location)
    return Texts(uids, [text for _, text in rows if text and text.strip()], len(rows) - len(uids))


def _read_parquet(file: pa.NativeFile, location: str) -> list[tuple[str, str | None]]:
    schema = pq.read_schema(file)
    if missing := [name for name in ("uid", "text") if name not in schema.names]:
        raise SearchError(
            f"{location} has no column {' and '.join(missing)}. Its columns are {', '.join(schema.names)}"
        )
    table = pq.read_table(file, columns=["uid", "text"]).cast(pa.schema({"uid": pa.string(), "text": pa.string()}))
    if table["uid"].null_count:
        raise SearchError(f"{location}: {table['uid'].null_count:,} rows have no uid")
    return list(zip(table["uid"].to_pylist(), table["text"].to_pylist(), strict=True))


def _read_lines(data: bytes, location: str) -> list[tuple[str, str | None]]:
    rows = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SearchError(f"{location}, line {number}: no JSON ({error})") from error
        uid, text = (row.get("uid"), row.get("text")) if isinstance(row, dict) else (None, None)
        if not isinstance(uid, str | int) or isinstance(uid, bool) or not isinstance(text, str | None):
            raise SearchError(f'{location}, line {number}: a line is {{"uid": "...", "text": "..."}}')
        rows.append((str(uid), text))
    return rows
