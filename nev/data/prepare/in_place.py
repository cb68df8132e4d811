"""Tars that stay where they are: for each tar an index, a shard whose column `image` has the place of each picture in the tar.

A task reads one tar once. Its usable rows, in the order of the tar, become row groups: the pictures of a row group are one range
of the tar's bytes. Rows that are left out stay in the tar, and are read over. An index is complete or absent, and says of which
tar and by which options it was made: an interrupted call continues, and a later one reads tars that have changed alone.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nev.config.base import ConfigError
from nev.data import labels
from nev.data.labels import Names
from nev.data.prepare.extras import write_classes, write_contact_sheet
from nev.data.prepare.filters import Filters, select
from nev.data.prepare.job_state import Record, exclusive_lock, remove_work, work_folder, write_json
from nev.data.prepare.order import DUPLICATE_UID, merge_keys
from nev.data.prepare.pipeline import TASK_BYTES, PrepareReport, Progress, Run, resolve_output, run_here
from nev.data.prepare.shards import OPTIONAL, build_table, infer_schema
from nev.data.prepare.tar_indexes import (
    TAR,
    IndexJob,
    choose_root,
    count_shared_uids,
    find_current,
    read_first_pictures,
    shard_of,
)
from nev.data.rows import Row, parse_captions, usable_rows
from nev.data.sources.common import SourceOptions, hash_content, parent_folder, relative_name
from nev.data.sources.input_files import File
from nev.data.sources.webdataset import read
from nev.data.tars import PLACE, Tar, find_ranges, write_metadata
from nev.data.uids import read_uids
from nev.storage.files import join, write_atomic
from nev.storage.reading import write_errors_as_data_errors

FORMAT = 1  # version of the indexes
SHARED_UIDS = "uids in several tars"


def index_tars(
    files: Sequence[File],
    output: str,
    options: SourceOptions,
    *,
    filters: Filters | None = None,
    row_group_rows: int = 256,
    overwrite: bool = False,
    run: Run = run_here,
    progress: Progress | None = None,
) -> PrepareReport:
    """Write an index of each tar to the folder `output`: TAR.parquet, in folders as the tars are.

    options: how samples are read.
    filters: conditions on rows.
    row_group_rows: rows of a row group; the last of a tar has fewer.
    overwrite: indexes by other options are replaced, and those of tars that are not in `files` removed.
    run: runs the tasks.
    progress: callbacks; the shards are indexes.

    A row whose uid another tar has, too, stays: it is counted.
    Raises ConfigError for tars that are compressed or damaged, for `filters.unique`, and for a folder with other indexes or
    shards; DataError where storage fails.
    """
    started_at = time.perf_counter()
    filters, progress = filters or Filters(), progress or Progress()
    output = resolve_output(output)
    job = IndexJob(
        output=output,
        root=choose_root(files, output),
        options=options,
        filters=filters,
        row_group_rows=row_group_rows,
        allowed_uids=None if filters.uids is None else read_uids(filters.uids),
        spec=_hash_spec(options, filters, row_group_rows),
    )
    _refuse(files, filters, job)
    with exclusive_lock(output):
        records = find_current(files, job, overwrite)
        write_json(join(work_folder(output), "job.json"), {"in_place": job.spec})
        todo = [file for file in files if file.location not in records]
        rows = sum(record["rows"] for record in records.values())
        progress.written(len(records), len(files), rows)
        for location, record in run(partial(index_tar, job=job), todo, TASK_BYTES):
            records[location] = record
            rows += record["rows"]
            progress.written(len(records), len(files), rows)
        ordered = [records[file.location] for file in files]
        plan = merge_keys(ordered, None)
        if not rows:
            reasons = ", ".join(f"{reason} ({count:,})" for reason, count in plan["dropped"].items())
            raise ConfigError(f"{output}: no rows to index. Dropped by reason: {reasons}")
        shards = [shard_of(file, job) for file in files]
        classes = write_classes(output, plan, progress.note, extend=True)
        samples = write_contact_sheet(output, read_first_pictures(shards), options.limits)
        remove_work(work_folder(output))
    pictures, nbytes = (sum(record[name] for record in ordered) for name in ("pictures", "nbytes"))
    read_bytes = sum(sum(record["group_bytes"]) for record in ordered)
    return PrepareReport(
        rows_in=plan["rows_in"],
        rows_written=rows,
        dropped=plan["dropped"],
        bytes=nbytes,
        seconds=time.perf_counter() - started_at,
        shards=shards,
        classes=classes,
        samples=samples,
        counts={
            "tars": len(files),
            "tars read now": len(todo),
            "bytes of pictures": pictures,
            "bytes read over": read_bytes - pictures,
            SHARED_UIDS: count_shared_uids(shards),
        },
    )


def index_tar(file: File, job: IndexJob) -> tuple[str, Record]:
    """The task: read one tar, and write its index. Returns the tar's location, and the record in the index's metadata.

    Raises ConfigError for a tar that is damaged, or compressed.
    """
    read_rows, dropped, names = Counter[str](), Counter[str](), Names()
    rows = usable_rows(
        _counted(read([file.location], job.options, job.root, in_place=True), read_rows), dropped, job.options.limits
    )
    chosen = select(rows, job.filters, job.options.limits, dropped, job.allowed_uids)
    places = list(_distinct(labels.collect_names(_placed(chosen, dropped), names, None), dropped))
    places.sort(key=lambda row: row["offset"])
    groups = [places[start : start + job.row_group_rows] for start in range(0, len(places), job.row_group_rows)]
    several = any(len(parse_captions(row["caption"])) > 1 for row in places)
    seen = {name for name in OPTIONAL for row in places if row.get(name) is not None}
    record = {
        "spec": job.spec,
        "rows_in": read_rows["rows"],
        "rows": len(places),
        "dropped": dict(dropped),
        "seen": sorted(seen),
        "names": [[label, *named] for label, named in names.items()],
        "highest": max((-1 if (label := row.get("label")) is None else label for row in places), default=-1),
        "pictures": sum(row["nbytes"] for row in places),
        "group_bytes": [_count_read(group) for group in groups],
    }
    digest = hash_content(
        [[row["uid"], row["caption"], row.get("label"), row["offset"], row["nbytes"]] for row in places]
    )
    location = shard_of(file, job)
    schema = infer_schema(seen, several).set(1, pa.field("image", PLACE))
    schema = schema.with_metadata(write_metadata(Tar(*file, digest), parent_folder(location), record))
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink, schema, compression="zstd", write_statistics=["image.offset", "image.nbytes", "label"]
    ) as writer:
        for group in groups:
            writer.write_table(build_table([_with_place(row) for row in group], schema), row_group_size=len(group))
    content = sink.getvalue().to_pybytes()
    with write_errors_as_data_errors(location):
        write_atomic(location, content)
    return file.location, {**record, "nbytes": len(content)}


def _count_read(group: Sequence[Row]) -> int:
    """Bytes of the tar that are read for a row group."""
    places = np.array([(row["offset"], row["nbytes"]) for row in group], np.int64)
    starts, ends = find_ranges(*places.T)
    return int((ends - starts).sum())


def _counted(rows: Iterable[Row], read_rows: Counter[str]) -> Iterator[Row]:
    for row in rows:
        read_rows["rows"] += 1
        yield row


def _placed(rows: Iterable[Row], dropped: Counter[str]) -> Iterator[Row]:
    """The rows without their pictures, with `nbytes`. A sparse member is left out: the tar does not have all of its bytes."""
    for row in rows:
        if row["offset"] < 0:
            dropped["sparse member of a tar"] += 1
        else:
            yield {**row, "nbytes": len(row["image"] or b""), "image": None}


def _distinct(rows: Iterable[Row], dropped: Counter[str]) -> Iterator[Row]:
    """Of the rows with one uid the first one."""
    seen = set[str]()
    for row in rows:
        if row["uid"] in seen:
            dropped[DUPLICATE_UID] += 1
        else:
            seen.add(row["uid"])
            yield row


def _with_place(row: Row) -> Any:
    return {**row, "image": {"offset": row["offset"], "nbytes": row["nbytes"]}}


def _hash_spec(options: SourceOptions, filters: Filters, row_group_rows: int) -> str:
    spec = [FORMAT, options.model_dump(mode="json"), filters.model_dump(mode="json"), row_group_rows]
    return hash_content([*spec, filters.uids.stat().st_mtime_ns if filters.uids else None])


def _refuse(files: Sequence[File], filters: Filters, job: IndexJob) -> None:
    if packed := next((file.location for file in files if not file.location.lower().endswith(TAR)), None):
        raise ConfigError(
            f"{packed}: a compressed tar. A picture in it cannot be read alone: unpack it to a .tar, or write shards (without "
            "--in-place)"
        )
    for file in files:
        if any(part.startswith(("_", ".")) for part in relative_name(job.root, file.location).split("/")):
            raise ConfigError(
                f"{file.location}: a name that begins with '_' or '.' is left out of training: rename the tar or its folder"
            )
    if filters.unique:
        raise ConfigError(
            "--dedupe compares the pictures of all tars, and --in-place reads one tar at a time: leave one out"
        )
