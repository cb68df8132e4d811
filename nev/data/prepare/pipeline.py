"""From the rows of a source to the shards of a split: leave out unusable rows, filter, shrink, shuffle, write, report.

There are three stages: `scatter` (a task for each part of the input), `order` (on the driver), and `gather` (a task for each
shard). Tasks share nothing and leave files. Finished tasks are not repeated after a crash. Memory does not grow with the set, but
for some bytes a row in `order`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from nev.common.location import S3, absolute_location
from nev.config.base import ConfigError
from nev.config.data import Limits
from nev.data import image_sidecar, labels, text_sidecar
from nev.data.prepare.contact_sheet import read_first_rows
from nev.data.prepare.extras import write_classes, write_contact_sheet
from nev.data.prepare.filters import Filters
from nev.data.prepare.gather import GatherJob, gather, list_runs
from nev.data.prepare.job_state import (
    JobState,
    Record,
    discard_parts,
    exclusive_lock,
    remove_work,
    start_or_resume,
    work_folder,
    write_json,
)
from nev.data.prepare.order import Order, compute_order, find_shard, merge_keys
from nev.data.prepare.resize import Resize
from nev.data.prepare.scatter import ScatterJob, count_buckets, fetch_keys, hash_seed, read_keys, run_location, scatter
from nev.data.prepare.shards import Layout, infer_schema, list_shards, shard_location
from nev.data.sources.common import Source, parent_folder, take_first
from nev.data.uids import read_uids
from nev.storage.files import PARALLEL_REQUESTS, filesystem, is_local, join
from nev.storage.reading import write_errors_as_data_errors

FORMAT = 2  # version of the files in `_prepare` and of the shards that follow from them
MEMORY_BYTES = 512 * 2**20
TASK_BYTES = 384 * 2**20  # memory of an idle process and of the rows in work

# (function, items, bytes of memory that a task needs) to the results, in the order of completion
Run = Callable[[Callable[[Any], Any], Sequence[Any], int], Iterable[Any]]


class PrepareReport(NamedTuple):
    """The result of a `prepare`.

    rows_in: rows of the source.
    rows_written: rows in the shards.
    dropped: rows that were left out, by reason.
    bytes: size of the shards.
    seconds: wall-clock time.
    shards: paths or URLs of the shards.
    classes: path or URL of classes.txt. None where there is none.
    samples: path or URL of the contact sheet.
    counts: further numbers, by their names.
    """

    rows_in: int
    rows_written: int
    dropped: dict[str, int]
    bytes: int
    seconds: float
    shards: list[str]
    classes: str | None
    samples: str
    counts: Mapping[str, int] = MappingProxyType({})


class Progress(NamedTuple):
    """Callbacks of a `prepare`.

    read: called with (parts done, parts in all, rows read).
    written: called with (shards done, shards in all, rows written).
    note: called with a message.
    """

    read: Callable[[int, int, int], None] = lambda done, total, rows: None
    written: Callable[[int, int, int], None] = lambda done, total, rows: None
    note: Callable[[str], None] = lambda text: None


def run_here(function: Callable[[Any], Any], items: Sequence[Any], task_bytes: int) -> Iterator[Any]:
    """Run the tasks in this process, one after another."""
    return map(function, items)


def prepare(
    source: Source,
    output: str | os.PathLike[str],
    *,
    seed: int = 0,
    limit: int | None = None,
    limits: Limits | None = None,
    filters: Filters | None = None,
    resize: Resize | None = None,
    layout: Layout | None = None,
    memory_bytes: int = MEMORY_BYTES,
    run: Run = run_here,
    progress: Progress | None = None,
) -> PrepareReport:
    """Write the usable rows of `source` to shards in the folder `output`, in random order.

    seed: of the order.
    limit: use only the first `limit` rows of the source. None: all.
    limits: of an encoded image.
    filters: conditions on rows. None: none.
    resize: how pictures are shrunk. None: not at all.
    layout: sizes of shards and row groups.
    memory_bytes: bytes of rows that a task holds before it writes them. Does not change the result.
    run: runs the tasks. Does not change the result.
    progress: callbacks.

    Columns: uid string, image binary, caption string (list<string> if a row has several captions), and label int64 and label_name
    string if a row has them. Every row group has `layout.row_group_rows` rows, but for the last one of the set. Beside the folder
    lie classes.txt, and <folder>-samples.png with some of the pictures.

    An interrupted call leaves `output/_prepare`, and the same call resumes. Raises ConfigError as `start_or_resume`,
    `exclusive_lock`, `Layout.check` and the source's reader do, where no row is left, and where a label has two names. Older
    shards are not removed then. Raises DataError where storage fails.
    """
    started_at = time.perf_counter()
    limits, filters, layout = limits or Limits(), filters or Filters(), layout or Layout()
    progress = progress or Progress()
    layout.check()
    output = resolve_output(os.fspath(output))
    if limit is not None:
        source = take_first(source, limit)
    job = ScatterJob(
        work=work_folder(output),
        read=source.read,
        seed_key=hash_seed(seed),
        buckets=count_buckets(source.nbytes),
        memory_bytes=memory_bytes,
        limits=limits,
        filters=filters,
        allowed_uids=None if filters.uids is None else read_uids(filters.uids),
        resize=resize,
        threads=(os.cpu_count() or 1) if run is run_here else 1,
        class_names=labels.read_class_names(join(parent_folder(output), "classes.txt")),
    )
    spec = None
    if source.spec is not None:
        sizes = {"seed": seed, "limit": limit, "rows_per_shard": layout.rows_per_shard}
        spec = {**source.spec, **_filter_spec(filters, resize), **sizes, "row_group_rows": layout.row_group_rows}
        spec |= {"limits": limits.model_dump(), "format": FORMAT}
    with exclusive_lock(output):
        state = start_or_resume(output, spec, [part.stamp for part in source.parts], layout.overwrite)
        if not source.parts:
            raise ConfigError("the source has no parts: nothing to read")
        for part in state.parts.values():  # all parts have the same buckets, even if the size of the input has changed
            job = job._replace(buckets=part["buckets"])
        _note_resumed(state, source, layout.rows_per_shard, progress)
        order = None
        plan = state.plan
        if plan is None:
            parts = _scatter_parts(source, state, job, run, progress)
            plan, order = _plan_shards(output, parts, state, job, layout)
            state = JobState(state.job, {}, plan, {})
        shards = _write_shards(output, plan, order, state, job, layout, run, progress)
        classes = write_classes(output, plan, progress.note)
        samples = write_contact_sheet(output, read_first_rows(shards[0]), limits)
        nbytes = sum(list_shards(output).values())
        remove_work(job.work)
    return PrepareReport(
        rows_in=plan["rows_in"],
        rows_written=plan["kept"],
        dropped=plan["dropped"],
        bytes=nbytes,
        seconds=time.perf_counter() - started_at,
        shards=shards,
        classes=classes,
        samples=samples,
    )


def _scatter_parts(source: Source, state: JobState, job: ScatterJob, run: Run, progress: Progress) -> list[Record]:
    """The first stage: the record of each part, from `scatter` or from an earlier call."""
    stamps = {part.stamp for part in source.parts}
    parts = {stamp: part for stamp, part in state.parts.items() if stamp in stamps}
    todo = [part for part in source.parts if part.stamp not in parts]
    rows = sum(part["rows_in"] for part in parts.values())
    progress.read(len(parts), len(source.parts), rows)
    for part in run(partial(scatter, job=job), todo, job.memory_bytes + TASK_BYTES):
        parts[part["stamp"]] = part
        rows += part["rows_in"]
        progress.read(len(parts), len(source.parts), rows)
    discard_parts(job.work, state.parts.keys() - stamps)
    return [parts[part.stamp] for part in source.parts]


def _plan_shards(
    output: str, parts: list[Record], state: JobState, job: ScatterJob, layout: Layout
) -> tuple[Record, Order]:
    """The second stage: write `plan.json`, and compute the order of the rows.

    Older shards are removed after all checks, and their sidecars too, whose vectors belong to other rows.
    """
    plan = merge_keys(parts, job.class_names) | {"job": state.job}
    # The files of a part are its runs and keys.npz.
    plan["parts"] = [[part["stamp"], part["rows"], len(part["files"]) - 1] for part in parts]
    order = _read_order(job.work, plan)
    plan["dropped"] |= order.dropped
    plan["kept"] = len(order.digests)
    if not len(order.digests):
        remove_work(job.work)  # nothing to resume
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in plan["dropped"].items()) or "none was read"
        raise ConfigError(f"{output}: no rows to write. Dropped by reason: {reasons}")
    fs, path = filesystem(output)
    with write_errors_as_data_errors(output):
        for name in state.shards:
            fs.rm_file(join(path, name))
        for folder in (text_sidecar.FOLDER, image_sidecar.FOLDER):
            if fs.exists(join(path, folder)):
                fs.rm(join(path, folder), recursive=True)
    write_json(join(job.work, "plan.json"), plan)
    return plan, order


def _read_order(work: str, plan: Record) -> Order:
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        stamps = [stamp for stamp, *_ in plan["parts"]]
        contents = pool.map(partial(fetch_keys, work), stamps)
        return compute_order([read_keys(content, work, part) for part, content in zip(stamps, contents, strict=True)])


def _write_shards(
    output: str,
    plan: Record,
    order: Order | None,
    state: JobState,
    job: ScatterJob,
    layout: Layout,
    run: Run,
    progress: Progress,
) -> list[str]:
    """The third stage: write the shards that `state` does not have. Returns the locations of all shards."""
    size = layout.rows_per_shard
    shards = [shard_location(output, number) for number in range(-(-plan["kept"] // size))]
    missing = [number for number, shard in enumerate(shards) if shard.rpartition("/")[2] not in state.shards]
    rows = plan["kept"] - sum(min(size, plan["kept"] - number * size) for number in missing)
    progress.written(len(shards) - len(missing), len(shards), rows)
    if not missing:
        return shards
    order = order or _read_order(job.work, plan)
    runs = [([run_location(job.work, stamp, run) for run in range(runs)], rows) for stamp, rows, runs in plan["parts"]]
    schema = infer_schema(plan["seen"], "captions" in plan["seen"])
    task = partial(gather, job=GatherJob(output, job.work, list(list_runs(runs)), schema, layout.row_group_rows))
    task_bytes = TASK_BYTES
    if not is_local(filesystem(output)[0]):
        run_bytes = int(order.offsets[:, -1].sum())
        task_bytes += run_bytes // len(shards) + 2 * run_bytes // job.buckets
    done = len(shards) - len(missing)
    for written in run(task, [find_shard(order, number, size) for number in missing], task_bytes):
        done += 1
        rows += written
        progress.written(done, len(shards), rows)
    return shards


def _filter_spec(filters: Filters, resize: Resize | None) -> Record:
    """The options of filters and resizing. Of the list of uids, its path, size and modification time."""
    spec: Record = {"filters": filters.model_dump(mode="json"), "resize": resize and resize.model_dump()}
    if filters.uids is not None:
        stat = filters.uids.stat()
        spec["uids"] = [str(filters.uids.absolute()), stat.st_size, stat.st_mtime_ns]
    return spec


def _note_resumed(state: JobState, source: Source, rows_per_shard: int, progress: Progress) -> None:
    parts = sum(part.stamp in state.parts for part in source.parts)
    if state.plan is not None:
        done = f"all parts, {len(state.shards)} of {-(-state.plan['kept'] // rows_per_shard)} shards are done"
    elif state.parts:
        done = f"{parts} of {len(source.parts)} parts are done"
    else:
        return
    progress.note(f"continuing an unfinished prepare: {done}")


def resolve_output(output: str) -> str:
    """The absolute path, for processes in other folders, or the URL. Raises ConfigError for a bucket without a folder."""
    absolute = absolute_location(output)
    if absolute.startswith(S3) and len(absolute.split("/")) < 4:
        raise ConfigError(f"{output}: a bucket alone cannot be a split. Give a folder in it: {absolute}/NAME")
    return absolute
