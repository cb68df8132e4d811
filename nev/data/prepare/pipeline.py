"""From any rows to a split: leave out what can't be used, choose, shrink, shuffle, write, and say what happened.

Three stages, each a list of tasks that share nothing and leave files: `scatter` (a task a part of the input), `cut` (on the
driver), `gather` (a task a shard). What is done is not done again after a crash, and memory does not grow with the set, save
for some bytes a row in `cut`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

from nev.config.base import ConfigError
from nev.config.data import Limits
from nev.data import labels, sidecar
from nev.data.prepare.contact_sheet import contact_sheet
from nev.data.prepare.filters import Filters
from nev.data.prepare.gather import GatherJob, gather, list_runs
from nev.data.prepare.job_state import (
    Facts,
    JobState,
    discard_parts,
    exclusive_lock,
    remove_work,
    start_or_resume,
    work_folder,
    write_json,
)
from nev.data.prepare.order import Order, compute_order, find_shard, merge_keys
from nev.data.prepare.resize import Resize
from nev.data.prepare.scatter import ScatterJob, count_buckets, fetch_keys, read_keys, run_location, scatter, seed_key
from nev.data.prepare.shards import Layout, infer_schema, list_shards, shard_location
from nev.data.rows import Row
from nev.data.sources.common import S3, Part, Source, hash_content
from nev.data.uids import read_uids
from nev.storage.files import PARALLEL_REQUESTS, filesystem, is_local, join, write_atomic
from nev.storage.reading import write_errors_as_data_errors

FORMAT = 2  # of `_prepare`: raised when what is in there, or what it leads to, changes
MEMORY_BYTES = 512 * 2**20
TASK_BYTES = 384 * 2**20  # of a process that does nothing yet, and the rows that it has just in hand

# (function, items, bytes of memory that a task needs) to the results, in any order, each as soon as it is there
Run = Callable[[Callable[[Any], Any], Sequence[Any], int], Iterable[Any]]


class PrepareReport(NamedTuple):
    """What one `prepare` did. bytes: size of the shards. classes: where classes.txt is, if there is one.

    shards, samples: paths or URLs of the shards and of the contact sheet.
    """

    rows_in: int
    rows_written: int
    dropped: dict[str, int]
    bytes: int
    seconds: float
    shards: list[str]
    classes: str | None
    samples: str


class Progress(NamedTuple):
    """Who is told of (parts done, parts in all, rows read), (shards done, shards in all, rows written), and in words."""

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
    """Write the usable rows of `source` (of its first `limit`) that satisfy `filters` to the folder `output`, shuffled.

    Columns: uid string, image binary, caption string (list<string> as soon as one row has several), and label int64
    and label_name string where any row has them. Every row group has `layout.row_group_rows` rows, save the last of the set.
    Beside the folder: classes.txt, and <folder>-samples.png with some of the pictures. memory_bytes: of the rows that a task
    holds before it writes them out. The result depends on neither `memory_bytes` nor `run`.

    A call that is cut off leaves `output/_prepare`; the same call goes on with it. Raises ConfigError as `start_or_resume`,
    `exclusive_lock`, `Layout.check` and the source's reader do, where no row is left, and where a label has two names: older
    shards are then still there. Raises DataError where storage fails.
    """
    started_at = time.perf_counter()
    limits, filters, layout = limits or Limits(), filters or Filters(), layout or Layout()
    progress = progress or Progress()
    layout.check()
    output = _resolve_output(os.fspath(output))
    if limit is not None:
        whole_input = Part(hash_content([part.stamp for part in source.parts]), [part.content for part in source.parts])
        source = source._replace(parts=[whole_input], read=partial(_first_rows, read=source.read, limit=limit))
    job = ScatterJob(
        work=work_folder(output),
        read=source.read,
        seed_key=seed_key(seed),
        buckets=count_buckets(source.nbytes),
        memory_bytes=memory_bytes,
        limits=limits,
        filters=filters,
        allowed_uids=None if filters.uids is None else read_uids(filters.uids),
        resize=resize,
        threads=(os.cpu_count() or 1) if run is run_here else 1,
        class_names=labels.read_class_names(join(_parent(output), "classes.txt")),
    )
    facts = None
    if source.facts is not None:
        x = {"seed": seed, "limit": limit, "rows_per_shard": layout.rows_per_shard}
        facts = {**source.facts, **_filter_spec(filters, resize), **x, "row_group_rows": layout.row_group_rows}
        facts |= {"limits": limits.model_dump(), "format": FORMAT}
    with exclusive_lock(output):
        state = start_or_resume(output, facts, [part.stamp for part in source.parts], layout.overwrite)
        if not source.parts:
            raise ConfigError("the source has no parts: nothing to read")
        for part in state.parts.values():  # of one size for all, though an input that was mended is larger
            job = job._replace(buckets=part["buckets"])
        _note_resumed(state, source, layout.rows_per_shard, progress)
        order = None
        plan = state.plan
        if plan is None:
            parts = _scatter_parts(source, state, job, run, progress)
            plan, order = _plan_shards(output, parts, state, job, layout)
            state = JobState(state.job, {}, plan, {})
        shards = _write_shards(output, plan, order, state, job, layout, run, progress)
        classes, samples = _write_extras(output, plan, limits, progress)
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


def _scatter_parts(source: Source, state: JobState, job: ScatterJob, run: Run, progress: Progress) -> list[Facts]:
    """The first stage: what `scatter` says of each part."""
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


def _plan_shards(output: str, parts: list[Facts], state: JobState, job: ScatterJob, layout: Layout) -> tuple[Facts, Order]:
    """The second stage: `plan.json`, and the order of the rows. Older shards are removed once nothing can go wrong.

    With them go their sidecars: vectors of captions that lay in other rows.
    """
    plan = merge_keys(parts, job.known) | {"job": state.job}
    # Beside its runs a part has keys.npz.
    plan["parts"] = [[part["stamp"], part["rows"], len(part["files"]) - 1] for part in parts]
    order = _read_order(job.work, plan)
    plan["dropped"] |= order.dropped
    plan["kept"] = len(order.digests)
    if not len(order.digests):
        remove_work(job.work)  # there is nothing to go on with
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in plan["dropped"].items()) or "none was read"
        raise ConfigError(f"{output}: no rows to write. Dropped by reason: {reasons}")
    fs, path = filesystem(output)
    with write_errors_as_data_errors(output):
        for name in state.shards:
            fs.rm_file(join(path, name))
        if fs.exists(join(path, sidecar.FOLDER)):
            fs.rm(join(path, sidecar.FOLDER), recursive=True)
    write_json(join(job.work, "plan.json"), plan)
    return plan, order


def _read_order(work: str, plan: Facts) -> Order:
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        stamps = [stamp for stamp, *_ in plan["parts"]]
        contents = pool.map(partial(fetch_keys, work), stamps)
        return compute_order([read_keys(content, work, part) for part, content in zip(stamps, contents, strict=True)])


def _write_shards(
    output: str,
    plan: Facts,
    order: Order | None,
    state: JobState,
    job: ScatterJob,
    layout: Layout,
    run: Run,
    progress: Progress,
) -> list[str]:
    """The third stage: all shards, of which `state` has some already."""
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
    needs = TASK_BYTES
    if not is_local(filesystem(output)[0]):
        run_bytes = int(order.offsets[:, -1].sum())
        needs += run_bytes // len(shards) + 2 * run_bytes // job.buckets
    done = len(shards) - len(missing)
    for written in run(task, [find_shard(order, number, size) for number in missing], needs):
        done += 1
        rows += written
        progress.written(done, len(shards), rows)
    return shards


def _write_extras(output: str, plan: Facts, limits: Limits, progress: Progress) -> tuple[str | None, str]:
    """Write classes.txt and the contact sheet; return where they are, the first if there is one."""
    parent, name = _parent(output), output.rpartition("/")[2]
    classes, samples = join(parent, "classes.txt"), join(parent, f"{name}-samples.png")
    class_names = labels.read_class_names(classes)
    if class_names:  # another split may have written it since this one was begun
        for label, called, uid in plan["named"]:
            labels.add_name({}, label, called, uid, class_names)
    there = class_names is not None
    if plan["names"] and not there:
        with write_errors_as_data_errors(classes):
            write_atomic(classes, "".join(f"{name}\n" for name in plan["names"]).encode())
        there = True
    if plan["labelled"] and not there:
        progress.note(
            f"no {classes} is written: the rows that were kept do not name every label from 0 to the highest, and no other. "
            "Scoring by class needs that file: one name a line, in the order of the labels."
        )
    sheet = contact_sheet(shard_location(output, 0), limits)
    with write_errors_as_data_errors(samples):
        write_atomic(samples, sheet)
    return (classes if plan["labelled"] and there else None), samples


def _first_rows(parts: Sequence[Any], read: Callable[[Any], Iterable[Row]], limit: int) -> Iterator[Row]:
    return islice(chain.from_iterable(map(read, parts)), limit)


def _filter_spec(filters: Filters, resize: Resize | None) -> Facts:
    """What the options say, and of the list of uids by what one sees that it changed."""
    facts: Facts = {"filters": filters.model_dump(mode="json"), "resize": resize and resize.model_dump()}
    if filters.uids is not None:
        found = filters.uids.stat()
        facts["uids"] = [str(filters.uids.absolute()), found.st_size, found.st_mtime_ns]
    return facts


def _note_resumed(state: JobState, source: Source, rows_per_shard: int, progress: Progress) -> None:
    parts = sum(part.stamp in state.parts for part in source.parts)
    if state.plan is not None:
        done = f"all parts, {len(state.shards)} of {-(-state.plan['rows_written'] // rows_per_shard)} shards are done"
    elif state.parts:
        done = f"{parts} of {len(source.parts)} parts are done"
    else:
        return
    progress.note(f"going on with an unfinished prepare: {done}")


def _resolve_output(output: str) -> str:
    """The same path for processes in other folders."""
    if not output.startswith(S3):
        return os.path.abspath(os.path.expanduser(output))  # noqa: PTH100
    if len(output.rstrip("/").split("/")) < 4:
        raise ConfigError(f"{output}: a bucket alone can't be a split. Give a folder in it: {output.rstrip('/')}/NAME")
    return output.rstrip("/")


def _parent(output: str) -> str:
    return output.rpartition("/")[0]
