"""What a `prepare` under way keeps in `<output>/_prepare`, path or s3:// URL, so that it can be gone on with.

`job.json` holds the options that determine the result, and comes first. `part-STAMP/part.json` says that a part of the input
is scattered; the stamp is that of its files, so that one that is mended, or put in, concerns its own part alone. `plan.json`
says that older shards are gone and every shard in the folder is one of this job; it has the options and all stamps again, and
goes last.
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

Facts = dict[str, Any]


class JobState(NamedTuple):
    """Where a job stands. plan: `plan.json`; shards: file name -> bytes.

    parts: stamp -> what its `part.json` says, of parts that are not asked for, too. job: the options.
    """

    job: Facts
    parts: dict[str, Facts]
    plan: Facts | None
    shards: dict[str, int]


def work_folder(output: str) -> str:
    """The folder of the work on the split `output`."""
    return join(output, WORK_FOLDER)


def start_or_resume(output: str, facts: Facts | None, stamps: Sequence[str], overwrite: bool) -> JobState:
    """Begin the job `facts` in the folder `output`, or go on with it if it was begun there.

    facts: JSON; None for a job that can only be begun. stamps: of the parts of its input. Raises ConfigError where
    shards are there and `overwrite` is not set, and where something of another job is done, unless `overwrite` is set: that
    job's work is removed then.
    """
    work, shards = work_folder(output), list_shards(output)
    facts, stamps = json.loads(json.dumps(facts)), list(stamps)  # as they are read again
    if len(set(stamps)) < len(stamps) or not all(re.fullmatch(r"\w+", stamp) for stamp in stamps):
        raise ValueError(f"stamps of parts must be words, and differ: {stamps}")
    plan = read_json(join(work, "plan.json"))
    before = read_json(join(work, "job.json")) if plan is None else plan["job"]
    planned = stamps if plan is None else [stamp for stamp, *_ in plan["parts"]]
    same = before is not None and before == facts and planned == stamps
    if same and plan is not None:
        if len(shards) == -(-plan["kept"] // plan["job"]["rows_per_shard"]):
            return JobState(plan["job"], {}, plan, shards)
        parts = _read_finished_parts(work)
        # A part that was read again may have other runs than the plan says.
        if all(stamp in parts and len(parts[stamp]["files"]) - 1 == runs for stamp, _, runs in plan["parts"]):
            return JobState(plan["job"], {}, plan, shards)
        log.warning(
            "%s: a part of what was read is damaged or gone. It is read again, and the shards are made anew.", work
        )
        return JobState(plan["job"], parts, None, shards)
    parts = {} if before is None else _read_finished_parts(work)
    other_input = planned != stamps or (bool(parts) and not parts.keys() & set(stamps))
    if before and (not same or other_input) and not overwrite and (parts or plan is not None):
        asked = facts or {}
        differing = ", ".join(
            sorted(name for name in before.keys() | asked.keys() if before.get(name) != asked.get(name))
            + ["input"] * other_input
        )
        raise ConfigError(
            f"{output}: holds an unfinished prepare, begun with other options ({differing}). Finish it with those, "
            "or --overwrite to start anew."
        )
    if shards and not overwrite:
        raise ConfigError(
            f"{output}: already holds {len(shards)} shard(s) ({next(iter(shards))}, ...). "
            "Use a new folder, or --overwrite to replace them."
        )
    if same and not other_input:
        return JobState(facts, parts, None, shards)
    _clear(work)
    write_json(join(work, "job.json"), facts or {})
    _remove_file(work, "plan.json")  # until here the other job's shards are known for half a split
    return JobState(facts or {}, {}, None, shards)


def _read_finished_parts(work: str) -> dict[str, Facts]:
    """The parts that are scattered, their runs whole."""
    fs, path = filesystem(work)
    with read_errors_as_data_errors(work, damaged=""):
        sizes = {name[len(path) + 1 :]: entry["size"] for name, entry in list_entries(fs, path).items()}
    names = sorted(name for name in sizes if re.fullmatch(r"part-\w+/part\.json", name))
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        found = [part for part in pool.map(partial(_read_part, work), names) if part]
    whole = [part for part in found if all(sizes.get(name) == size for name, size in part["files"].items())]
    return {part["stamp"]: part for part in whole}


def _read_part(work: str, name: str) -> Facts | None:
    """What a `part.json` says; None where it is damaged, or an older version's."""
    try:
        part = read_json(join(work, name))
    except DataError:
        return None
    return part if part and "stamp" in part else None


def remove_work(work: str) -> None:
    """Remove a job's work, `plan.json` last: a job that is cut off here is known for what it is."""
    _clear(work)
    for name in LAST:
        _remove_file(work, name)
    fs, path = filesystem(work)
    with write_errors_as_data_errors(work):
        if is_local(fs) and fs.exists(path):
            fs.rmdir(path)


def discard_parts(work: str, stamps: Iterable[str]) -> None:
    """Remove parts that are not asked for."""
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
        found = fs.ls(path, detail=False) if is_local(fs) else fs.find(path)
        if rest := [name for name in found if name.rpartition("/")[2] not in LAST]:
            fs.rm(rest, recursive=is_local(fs))


def _remove_file(work: str, name: str) -> None:
    fs, path = filesystem(join(work, name))
    with write_errors_as_data_errors(work):
        if fs.exists(path):
            fs.rm_file(path)


def read_json(location: str) -> Facts | None:
    """The JSON object at `location`, or None where there is none."""
    fs, path = filesystem(location)
    with read_errors_as_data_errors(location, damaged=""):
        try:
            content = fs.cat_file(path)
        except FileNotFoundError:
            return None
    try:
        found: Facts = json.loads(content)
    except ValueError as error:
        raise DataError(f"{location} is damaged ({error}). {DAMAGED}") from error
    return found


def write_json(location: str, content: Facts) -> None:
    """Write a JSON object, whole or not at all."""
    with write_errors_as_data_errors(location):
        write_atomic(location, json.dumps(content, indent=1).encode())


@contextmanager
def exclusive_lock(output: str) -> Iterator[None]:
    """Keep other processes on this machine from preparing the same local folder; on S3 nobody is kept away.

    Raises ConfigError where another one does. The lock goes with the process, however that ends. File systems without locks
    are a warning.
    """
    import fcntl

    fs, path = filesystem(output)
    if not is_local(fs):
        yield
        return
    if fs.exists(path) and not fs.isdir(path):
        raise ConfigError(f"{output}: is a file. A split is a folder: give another name.")
    with write_errors_as_data_errors(output):
        make_folder(fs, path)
        handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(f"{output}: another prepare is at work in this folder. Wait for its end.") from None
    except OSError as error:
        log.warning("%s: no lock can be had there (%s): nothing keeps a second prepare away", output, error)
    try:
        yield
    finally:
        os.close(handle)
