"""The files in `<output>/_prepare` (path or s3:// URL) from which an interrupted `prepare` is resumed.

`job.json` holds the options that determine the result. It is written first. `part-STAMP/part.json` means that a part of the input
has been scattered. The stamp depends on the files of the part, so a file that is repaired or added concerns its own part alone.
`plan.json` means that older shards have been removed and that every shard in the folder is of this job. It repeats the options
and all stamps, and is removed last.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from nev.config.base import ConfigError
from nev.data.index import WORK_FOLDER
from nev.data.prepare.shards import list_shards
from nev.storage.files import PARALLEL_REQUESTS, filesystem, is_local, join, list_entries, make_folder, write_atomic
from nev.storage.reading import DataError, read_errors_as_data_errors, write_errors_as_data_errors

DAMAGED = "Delete it and run the same command again."
LAST = ("job.json", "plan.json")

log = logging.getLogger("nev.prepare")

JobSpec = dict[str, Any]  # the options of a job, as in job.json
Record = dict[str, Any]  # the content of part.json or plan.json


class JobState(NamedTuple):
    """The state of a job.

    job: the options.
    parts: the `part.json` of each finished part, by stamp. Parts that are no longer in the input are among them.
    plan: `plan.json`, or None before it is written.
    shards: size in bytes of each shard in the folder, by file name.
    """

    job: JobSpec
    parts: dict[str, Record]
    plan: Record | None
    shards: dict[str, int]


def work_folder(output: str) -> str:
    """The folder of the intermediate files of the split `output`."""
    return join(output, WORK_FOLDER)


def start_or_resume(output: str, spec: JobSpec | None, stamps: Sequence[str], overwrite: bool) -> JobState:
    """Start a job in the folder `output`, or resume the same job.

    spec: the options of the job. None for a job that cannot be resumed.
    stamps: of the parts of the input.
    overwrite: replace shards in the folder, and discard the work of another job.
    Raises ConfigError where the folder holds shards, or finished work of another job, and `overwrite` is not set.
    """
    work, shards = work_folder(output), list_shards(output)
    spec, stamps = json.loads(json.dumps(spec)), list(stamps)  # as JSON gives them back
    if len(set(stamps)) < len(stamps) or not all(re.fullmatch(r"\w+", stamp) for stamp in stamps):
        raise ValueError(f"stamps of parts must be words, and differ: {stamps}")
    plan = read_json(join(work, "plan.json"))
    previous = read_json(join(work, "job.json")) if plan is None else plan["job"]
    planned = stamps if plan is None else [stamp for stamp, *_ in plan["parts"]]
    same = previous is not None and previous == spec and planned == stamps
    if same and plan is not None:
        if len(shards) == -(-plan["kept"] // plan["job"]["rows_per_shard"]):
            return JobState(plan["job"], {}, plan, shards)
        parts = _read_finished_parts(work)
        # A part that was scattered again may have other runs than the plan lists.
        if all(stamp in parts and len(parts[stamp]["files"]) - 1 == runs for stamp, _, runs in plan["parts"]):
            return JobState(plan["job"], {}, plan, shards)
        log.warning(
            "%s: a part of these files is damaged or missing. It is read again, and all shards are written again.",
            work,
        )
        return JobState(plan["job"], parts, None, shards)
    parts = {} if previous is None else _read_finished_parts(work)
    other_input = planned != stamps or (bool(parts) and not parts.keys() & set(stamps))
    if previous and (not same or other_input) and not overwrite and (parts or plan is not None):
        options = spec or {}
        differing = ", ".join(
            sorted(name for name in previous.keys() | options.keys() if previous.get(name) != options.get(name))
            + ["input"] * other_input
        )
        raise ConfigError(
            f"{output}: holds an unfinished prepare with other options ({differing}). Finish it with those options, "
            "or --overwrite to start again."
        )
    if shards and not overwrite:
        raise ConfigError(
            f"{output}: already holds {len(shards)} shard(s) ({next(iter(shards))}, ...). "
            "Use a new folder, or --overwrite to replace them."
        )
    if same and not other_input:
        return JobState(spec, parts, None, shards)
    _clear(work)
    write_json(join(work, "job.json"), spec or {})
    _remove_file(work, "plan.json")  # last: with it, the shards of the other job count as unfinished
    return JobState(spec or {}, {}, None, shards)


def _read_finished_parts(work: str) -> dict[str, Record]:
    """The records of the parts that have been scattered, and whose files have their full sizes, by stamp."""
    fs, path = filesystem(work)
    with read_errors_as_data_errors(work, damaged=""):
        sizes = {name[len(path) + 1 :]: entry["size"] for name, entry in list_entries(fs, path).items()}
    names = sorted(name for name in sizes if re.fullmatch(r"part-\w+/part\.json", name))
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        parts = [part for part in pool.map(partial(_read_part, work), names) if part]
    complete = [part for part in parts if all(sizes.get(name) == size for name, size in part["files"].items())]
    return {part["stamp"]: part for part in complete}


def _read_part(work: str, name: str) -> Record | None:
    """Read a `part.json`. None where it is damaged, or of an older version."""
    try:
        part = read_json(join(work, name))
    except DataError:
        return None
    return part if part and "stamp" in part else None


def remove_work(work: str) -> None:
    """Remove the intermediate files of a job. `plan.json` goes last, so that an interruption leaves a job that can be resumed."""
    _clear(work)
    for name in LAST:
        _remove_file(work, name)
    fs, path = filesystem(work)
    with write_errors_as_data_errors(work):
        if is_local(fs) and fs.exists(path):
            fs.rmdir(path)


def discard_parts(work: str, stamps: Iterable[str]) -> None:
    """Remove the files of these parts."""
    fs, path = filesystem(work)
    with write_errors_as_data_errors(work):
        for stamp in stamps:
            fs.rm(f"{path}/part-{stamp}", recursive=True)


def _clear(work: str) -> None:
    """Remove all but `job.json` and `plan.json`."""
    fs, path = filesystem(work)
    with write_errors_as_data_errors(work):
        if not fs.exists(path):
            return
        names = fs.ls(path, detail=False) if is_local(fs) else fs.find(path)
        if rest := [name for name in names if name.rpartition("/")[2] not in LAST]:
            fs.rm(rest, recursive=is_local(fs))


def _remove_file(work: str, name: str) -> None:
    fs, path = filesystem(join(work, name))
    with write_errors_as_data_errors(work):
        if fs.exists(path):
            fs.rm_file(path)


def read_json(location: str) -> Record | None:
    """Read the JSON object at `location`. None where there is no file. Raises DataError for a damaged file."""
    fs, path = filesystem(location)
    with read_errors_as_data_errors(location, damaged=""):
        try:
            content = fs.cat_file(path)
        except FileNotFoundError:
            return None
    try:
        record: Record = json.loads(content)
    except ValueError as error:
        raise DataError(f"{location} is damaged ({error}). {DAMAGED}") from error
    return record


def write_json(location: str, content: Record) -> None:
    """Write a JSON object, completely or not at all."""
    with write_errors_as_data_errors(location):
        write_atomic(location, json.dumps(content, indent=1).encode())


@contextmanager
def exclusive_lock(output: str, command: str = "prepare") -> Iterator[None]:
    """Hold a lock on a local folder, so that no other process of this machine writes to it. On S3 there is no lock.

    command: that writes, for messages.
    Raises ConfigError where another process holds the lock. The lock ends with the process, even if it is killed. A file system
    without locks is logged as a warning.
    """
    import fcntl

    fs, path = filesystem(output)
    if not is_local(fs):
        yield
        return
    if fs.exists(path) and not fs.isdir(path):
        raise ConfigError(f"{output}: is a file. The output is a folder: give another name.")
    with write_errors_as_data_errors(output):
        make_folder(fs, path)
        handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(f"{output}: another {command} is at work in this folder. Wait for its end.") from None
    except OSError as error:
        log.warning("%s: this file system has no locks (%s): do not run a second %s there", output, error, command)
    try:
        yield
    finally:
        os.close(handle)
