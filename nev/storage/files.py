"""Files at local paths and `s3://` URLs, by fsspec's filesystems (s3fs for S3, see `nev.storage.s3`).

botocore finds endpoint, region and credentials of S3: in AWS_ENDPOINT_URL, AWS_PROFILE, AWS_ACCESS_KEY_ID and so on, in the
profile's file, or in the role of the machine.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from nev.common.errors import NevError
from nev.common.location import S3, absolute_location, check_location

PARALLEL_REQUESTS = 16  # threads for requests of small files, which mostly wait


class StorageError(NevError, RuntimeError):
    """A file of a run cannot be read or written. The message names the file and says what to do."""


def filesystem(location: str) -> tuple[Any, str]:
    """The fsspec filesystem of a path or URL, and the path inside it. Local paths become absolute.

    Raises LocationError for another URL than s3://.
    """
    if location.startswith(S3):
        from nev.storage.s3 import s3_filesystem

        return s3_filesystem(), check_location(location).removeprefix(S3)
    return LocalFileSystem(), absolute_location(location)


def join(location: str, *parts: str) -> str:
    """`location/part/...`, for paths and URLs alike."""
    return "/".join([location.rstrip("/"), *parts])


def is_local(fs: Any) -> bool:
    """Whether a filesystem is the local one."""
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def open_parquet(fs: Any, path: str, info: dict[str, Any] | None = None) -> Any:
    """Open a parquet file for reading. On S3 each read is one request for exactly the bytes that pyarrow asks for.

    info: the file's entry in a listing. With it no request for size and ETag is needed. A file that no longer has this ETag is
        refused by the store.
    """
    if is_local(fs):
        return fs.open(path, "rb")
    file = fs.open(path, "rb", cache_type="none", size=info["size"] if info else None)
    if info:
        file.details = info
        if (etag := info.get("ETag")) and not fs.local_expiry_check:
            file.read_kw = {
                **file.read_kw,
                "IfMatch": etag,
            }  # s3fs sets this only where it has asked for the ETag itself
    return file


def make_folder(fs: Any, path: str) -> None:
    """Make a local folder and its parents. On S3 nothing is done: S3 has no folders, and s3fs would try to make the bucket."""
    if is_local(fs):
        new = list(takewhile(lambda folder: not folder.exists(), (Path(path), *Path(path).parents)))
        fs.makedirs(path, exist_ok=True)
        for folder in new:
            _sync(folder.parent)


@contextmanager
def atomic_file(location: str, folder: str | None = None) -> Iterator[str]:
    """A local path to write to. Its content is moved to `location` in one step at the end, or dropped after an error.

    folder: where a local file is written first, on the same disk as `location`. None: beside `location`.

    A local file is renamed. On S3 an object becomes visible when its upload is complete, so the file is uploaded.
    """
    fs, path = filesystem(location)
    local, home = is_local(fs), path.rpartition("/")[0]
    make_folder(fs, home)
    if folder:
        make_folder(fs, folder)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=(folder or home) if local else None) as temporary:
        partial = Path(temporary, path.rpartition("/")[2])
        yield str(partial)
        if not local:
            fs.put_file(str(partial), path)
            return
        _sync(partial)
        partial.replace(path)
        _sync(Path(home))


def write_atomic(location: str, data: bytes) -> None:
    """Write a file so that it is complete or absent. Parents are made; an existing file is replaced."""
    fs, path = filesystem(location)
    if is_local(fs):
        with atomic_file(location) as partial:
            Path(partial).write_bytes(data)
    else:
        fs.pipe_file(path, data)


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk, so that a power cut leaves nothing half written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def list_files(location: str) -> list[str]:
    """The files below a folder or prefix, at any depth: paths relative to `location`, sorted. Empty for a missing folder.

    On S3 this is one listing, with a request for each 1,000 objects. No cache is used.
    """
    fs, path = filesystem(location.rstrip("/"))
    return sorted(file[len(path) + 1 :] for file in list_entries(fs, path) if len(file) > len(path))


def list_entries(fs: Any, path: str) -> dict[str, dict[str, Any]]:
    """All files below a folder, at any depth, by their full path. Raises for a folder that cannot be listed."""
    strict = {"on_error": "raise"} if is_local(fs) and fs.exists(path) else {}
    entries: dict[str, dict[str, Any]] = fs.find(path, detail=True, **strict)
    return entries


@contextmanager
def local_copy(location: str, only: Sequence[str] | None = None) -> Iterator[Path]:
    """A local path to a file or folder: the path itself where it is local, else a copy that is removed at the end.

    only: files of the folder to copy, relative to `location`. None: all.
    Raises StorageError, also for an S3 key that would be copied outside its folder.
    """
    fs, path = filesystem(location)
    if is_local(fs):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="nev-") as folder:
        copy = Path(folder, path.rsplit("/", 1)[-1])
        with storage_errors_as(location, "listed"):
            names = list_files(location) if only is None else only
        for name in names or [""]:
            if name and any(part in ("", ".", "..") for part in name.split("/")):
                raise StorageError(
                    f"{location}/{name}: this name leads out of its folder, so nothing is copied. Rename it."
                )
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with storage_errors_as(f"{location}/{name}".rstrip("/"), "read"):
                fs.get_file(f"{path}/{name}".rstrip("/"), str(target))
        yield copy


@contextmanager
def output_folder(location: str) -> Iterator[Path]:
    """A local folder to write files in. For S3 the files are uploaded to `location` at the end, unless the body has raised."""
    fs, path = filesystem(location)
    if is_local(fs):
        make_folder(fs, path)
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="nev-") as folder:
        yield Path(folder)
        upload(Path(folder), location)


@contextmanager
def whole_folder(location: str, last: str) -> Iterator[Path]:
    """A local folder to write files in, which is moved to `location` at the end, or dropped after an error.

    location: where nothing is yet, or an empty folder; a link to a folder is followed. On S3 the files are uploaded at the end.
    last: the file that comes last, where the files have to come one by one: on S3, and into a folder that exists.
    """
    fs, path = filesystem(location)
    if not is_local(fs):
        with tempfile.TemporaryDirectory(prefix="nev-") as temporary:
            yield Path(temporary)
            upload(Path(temporary), location, last)
        return
    target = Path(path).resolve()
    there = target.is_dir()
    make_folder(fs, str(target.parent))
    # Inside a folder that exists: it may be a disk of its own, as in a container.
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=target if there else target.parent) as temporary:
        folder = Path(temporary, "folder")
        folder.mkdir()
        yield folder
        if there:
            for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == last):
                entry.replace(target / entry.name)
        else:
            folder.replace(target)


def upload(source: Path, location: str, last: str = "") -> None:
    """Upload a local file to `location` on S3, or the files of a local folder below `location`, by the same names.

    last: the file of the folder that comes last.
    """
    fs, path = filesystem(location)
    files = [file for file in sorted(source.rglob("*")) if file.is_file()] if source.is_dir() else [source]
    for file in sorted(files, key=lambda file: file == source / last):
        name = "" if file == source else f"/{file.relative_to(source).as_posix()}"
        with storage_errors_as(f"{location}{name}", "written"):
            fs.put_file(str(file), f"{path}{name}")


def move(source: str, target: str, last: str = "") -> None:
    """Move a file or a folder within one storage. What is at `target` already is replaced.

    last: the file of the folder that arrives last and leaves first, where a storage moves file by file.
    """
    (fs, path), (_, goal) = filesystem(source), filesystem(target)
    if is_local(fs):
        Path(goal).parent.mkdir(parents=True, exist_ok=True)
        if Path(goal).is_dir():
            shutil.rmtree(goal)
        Path(path).replace(goal)
        return
    names = sorted(list_files(source) or [""], key=lambda name: name == last)
    for name in names:
        fs.cp_file(f"{path}/{name}".rstrip("/"), f"{goal}/{name}".rstrip("/"))
    for name in reversed(names):
        fs.rm_file(f"{path}/{name}".rstrip("/"))


@contextmanager
def storage_errors_as(
    location: str, action: str, damaged: str = "", kind: Callable[[str], NevError] = StorageError
) -> Iterator[None]:
    """Turn errors of storage into an error of `kind`, whose message says that `location` cannot be read (or so), and what to do.

    action: a participle for the message: "read", "written", "listed".
    damaged: advice for a file whose content is damaged.
    """
    try:
        yield
    except storage_errors() as error:
        no_folder = action == "written" and isinstance(error, FileNotFoundError)
        advice = "Nothing can be made at this place: choose another." if no_folder else remedy(error, damaged)
        raise kind(f"{location} cannot be {action} ({error}). {advice}".rstrip()) from error


def storage_errors() -> tuple[type[Exception], ...]:
    """The exceptions that reading and writing can raise. Called in `except`, so that the slow imports wait for an error."""
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError
    from botocore.parsers import ResponseParserError

    return (OSError, pa.ArrowException, BotoCoreError, ResponseParserError, ClientError)


def is_damage(error: BaseException | None) -> bool:
    """Whether the bytes were read but are damaged. Parquet raises its own errors, or an OSError without errno."""
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)


def remedy(error: Exception, damaged: str) -> str:
    """Advice for a storage error, for a message. damaged: the advice where the content is damaged."""
    if is_damage(error):
        return damaged
    if isinstance(error, FileNotFoundError):
        return "It does not exist (any more): restore it, or start again without it."
    if isinstance(error, NotADirectoryError):
        return "A part of that path is a file: give another folder."
    if isinstance(error, PermissionError):
        return "Access is denied: allow it; for s3:// check AWS_PROFILE or AWS_ACCESS_KEY_ID and the bucket's policy."
    if (
        type(error).__name__ == "FileExpired"
    ):  # of s3fs, which is not imported for local files: the object has another ETag
        return "It was replaced meanwhile: start again."
    return "The storage fails: check disk and network, for s3:// AWS_ENDPOINT_URL and AWS_PROFILE."
