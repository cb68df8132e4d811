"""Tars that stay where they are: for each tar an index, a shard whose column `image` has the place of each picture in the tar.

A task reads one tar once. Its usable rows, in the order of the tar, become row groups: the pictures of a row group are one range
of the tar's bytes. Rows that are left out stay in the tar, and are read over. An index is complete or absent, and says of which
tar and by which options it was made: an interrupted call continues, and a later one reads tars that have changed alone.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nev.config.base import ConfigError
from nev.data import labels
from nev.data.labels import ClassNames, Names
from nev.data.prepare.contact_sheet import CELLS
from nev.data.prepare.extras import write_classes, write_contact_sheet
from nev.data.prepare.filters import Filters, select
from nev.data.prepare.job_state import Record, exclusive_lock, read_json, remove_work, work_folder, write_json
from nev.data.prepare.order import DUPLICATE_UID, merge_keys
from nev.data.prepare.pipeline import TASK_BYTES, PrepareReport, Progress, Run, resolve_output, run_here
from nev.data.prepare.shards import OPTIONAL, build_table, infer_schema
from nev.data.rows import Row, parse_captions, usable_rows
from nev.data.shard_files import ShardFiles
from nev.data.sources.common import File, SourceOptions, hash_content, parent_folder, relative_name, shared_folder
from nev.data.sources.webdataset import read
from nev.data.tars import PLACE, Tar, read_metadata, write_metadata
from nev.data.uids import Keys, hash_uids, read_uids
from nev.storage.files import PARALLEL_REQUESTS, filesystem, join, list_files, open_parquet, write_atomic
from nev.storage.reading import CUT_SHORT, read_column, read_errors_as_data_errors, write_errors_as_data_errors

FORMAT = 1  # version of the indexes
TAR, PARQUET = ".tar", ".parquet"


class IndexJob(NamedTuple):
    """The settings of a task.

    output: folder of the indexes. root: folder that the names of tars are relative to.
    options, filters, row_group_rows: as `index_tars` has them.
    allowed_uids: keys of the uids to keep. None: all.
    class_names: the classes.txt beside the output. None: there is none.
    spec: hash of all options on which an index depends.
    """

    output: str
    root: str
    options: SourceOptions
    filters: Filters
    row_group_rows: int
    allowed_uids: Keys | None
    class_names: ClassNames | None
    spec: str


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

    options: how samples are read. filters: conditions on rows. row_group_rows: rows of a row group; the last of a tar has fewer.
    overwrite: indexes by other options are replaced, and those of tars that are not in `files` removed.
    run: runs the tasks. progress: callbacks; the shards are indexes.

    A row whose uid another tar has, too, stays: it is counted.
    Raises ConfigError for tars that are compressed or damaged, for `filters.unique`, and for a folder with other indexes or
    shards; DataError where storage fails.
    """
    started_at = time.perf_counter()
    filters, progress = filters or Filters(), progress or Progress()
    _refuse(files, filters)
    output = resolve_output(output)
    job = IndexJob(
        output=output,
        root=shared_folder(parent_folder(file.location) for file in files),
        options=options,
        filters=filters,
        row_group_rows=row_group_rows,
        allowed_uids=None if filters.uids is None else read_uids(filters.uids),
        class_names=labels.read_class_names(join(parent_folder(output), "classes.txt")),
        spec=_hash_spec(options, filters, row_group_rows),
    )
    with exclusive_lock(output):
        records = _find_done(files, job, overwrite)
        write_json(join(work_folder(output), "job.json"), {"in_place": job.spec})
        todo = [file for file in files if file.location not in records]
        rows = sum(record["rows"] for record in records.values())
        progress.written(len(records), len(files), rows)
        for location, record in run(partial(index_tar, job=job), todo, TASK_BYTES):
            records[location] = record
            rows += record["rows"]
            progress.written(len(records), len(files), rows)
        ordered = [records[file.location] for file in files]
        plan = merge_keys(ordered, job.class_names)
        if not rows:
            reasons = ", ".join(f"{reason} ({count:,})" for reason, count in plan["dropped"].items())
            raise ConfigError(f"{output}: no rows to index. Dropped by reason: {reasons}")
        shards = [shard_of(file, job) for file in files]
        repeated = _count_repeated(shards)
        classes = write_classes(output, plan, progress.note)
        samples = write_contact_sheet(output, _first_rows(shards), options.limits)
        remove_work(work_folder(output))
    pictures, ranges, nbytes = (sum(record[name] for record in ordered) for name in ("pictures", "ranges", "nbytes"))
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
            "bytes between them": ranges - pictures,
            "uids in several tars": repeated,
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
    places = list(_distinct(labels.collect_names(_placed(chosen, dropped), names, job.class_names), dropped))
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
        "ranges": sum(group[-1]["offset"] + group[-1]["nbytes"] - group[0]["offset"] for group in groups),
    }
    location = shard_of(file, job)
    schema = infer_schema(seen, several).set(1, pa.field("image", PLACE))
    schema = schema.with_metadata(write_metadata(Tar(*file), parent_folder(location), record))
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


def shard_of(file: File, job: IndexJob) -> str:
    """Path or URL of the index of a tar."""
    return join(job.output, relative_name(job.root, file.location).removesuffix(TAR) + PARQUET)


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


def _refuse(files: Sequence[File], filters: Filters) -> None:
    if packed := next((file.location for file in files if not file.location.endswith(TAR)), None):
        raise ConfigError(
            f"{packed}: a compressed tar. A picture in it cannot be read alone: unpack it to a .tar, or write shards (without "
            "--in-place)"
        )
    if filters.unique:
        raise ConfigError(
            "--dedupe compares the pictures of all tars, and --in-place reads one tar at a time: leave one out"
        )


def _find_done(files: Sequence[File], job: IndexJob, overwrite: bool) -> dict[str, Record]:
    """The records of the tars whose index is there and up to date, by location.

    Raises ConfigError for other parquet files, indexes by other options, and indexes of other tars.
    """
    left = read_json(join(work_folder(job.output), "job.json"))
    if left is not None and "in_place" not in left:
        raise ConfigError(
            f"{job.output}: holds an unfinished prepare that writes shards. Finish it, or use a new folder."
        )
    names = [name for name in list_files(job.output) if name.endswith(PARQUET) and name[0] not in "._"]
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        known = dict(zip(names, pool.map(partial(_read_record, job.output), names), strict=True))
    expected = {shard_of(file, job): file for file in files}
    done, strange = {}, []
    for name, record in known.items():
        file = expected.get(join(job.output, name))
        if record is None:
            raise ConfigError(f"{job.output}: holds other parquet files ({name}, ...). Use a new folder.")
        if file is None:
            strange.append(name)
        elif record[1]["spec"] != job.spec and not overwrite:
            raise ConfigError(f"{job.output}: {name} was made with other options. Use a new folder, or --overwrite.")
        elif record[1]["spec"] == job.spec and record[0] == Tar(*file):
            done[file.location] = record[1]
    if strange and not overwrite:
        raise ConfigError(
            f"{job.output}: holds the index of tars that are not in the input ({strange[0]}, ...). --overwrite removes them."
        )
    for name in strange:
        fs, path = filesystem(join(job.output, name))
        with write_errors_as_data_errors(name):
            fs.rm_file(path)
    return done


def _read_record(output: str, name: str) -> tuple[Tar, Record] | None:
    """The tar and the record of an index; None for another parquet file."""
    fs, path = filesystem(join(output, name))
    with read_errors_as_data_errors(join(output, name), CUT_SHORT), open_parquet(fs, path) as file:
        metadata = pq.read_metadata(file).metadata
        nbytes = fs.size(path)
    known = read_metadata(metadata, join(output, name))
    return (known[0], {**known[1], "nbytes": nbytes}) if known else None


def _count_repeated(shards: Sequence[str]) -> int:
    """Rows whose uid comes in an earlier shard, too. 16 bytes a row are in memory."""
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        parts = pool.map(lambda shard: hash_uids(read_column(shard, "uid").to_pylist()), shards)
        keys = np.sort(np.concatenate(list(parts)))
    return int((keys[1:] == keys[:-1]).sum())


def _first_rows(shards: Sequence[str]) -> list[Row]:
    """The first rows of the first index with rows, with their pictures."""
    files = ShardFiles()
    for shard in shards:
        fs, path = filesystem(shard)
        with read_errors_as_data_errors(shard, CUT_SHORT), open_parquet(fs, path) as file:
            footer = pq.read_metadata(file)
        known = read_metadata(footer.metadata, shard)
        if footer.num_rows and known:
            table = files.read(shard, 0, ["uid", "image", "caption"], 0, min(CELLS, footer.row_group(0).num_rows))
            pictures = files.read_pictures(known[0], table["image"])
            rows: list[Row] = table.drop_columns("image").to_pylist()
            return [{**row, "image": picture.to_pybytes()} for row, picture in zip(rows, pictures, strict=True)]
    return []
