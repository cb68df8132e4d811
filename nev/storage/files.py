"""Local paths and `s3://` URLs behind one door: fsspec's filesystems (s3fs for S3, see `nev.storage.s3`).

Endpoint, region and credentials of S3 come from where botocore looks for them: AWS_ENDPOINT_URL, AWS_PROFILE,
AWS_ACCESS_KEY_ID and the rest, the profile's file, the machine's role.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import pyarrow as pa
from fsspec.core import url_to_fs

from nev.common.errors import NevError

PARALLEL_REQUESTS = 16  # of small files, which are mostly waiting


class StorageError(NevError, RuntimeError):
    """A file of a run that cannot be read or written. The message names it and says what to do."""


def filesystem(location: str) -> tuple[Any, str]:
    """The fsspec filesystem of a path or URL, and the path inside it. Local paths become absolute."""
    if location.startswith("s3://"):
        from nev.storage.s3 import s3_filesystem

        return s3_filesystem(), location.removeprefix("s3://")
    fs, path = url_to_fs(os.path.expanduser(location))
    return fs, path


def join(location: str, *parts: str) -> str:
    """`location/part/...`, for paths and URLs alike."""
    return "/".join([location.rstrip("/"), *parts])


def is_local(fs: Any) -> bool:
    """Whether a filesystem is that of this machine."""
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def open_parquet(fs: Any, path: str, info: dict[str, Any] | None = None) -> Any:
    """A parquet file for reading. Each read of a remote one is one request for exactly its bytes: pyarrow knows what it needs.

    `info`, the file's entry in a listing, saves the request for its size and ETag, by which a file that changes is noticed.
    """
    if is_local(fs):
        return fs.open(path, "rb")
    file = fs.open(path, "rb", cache_type="none", size=info["size"] if info else None)
    if info:
        file.details = info
    return file


def make_folder(fs: Any, path: str) -> None:
    """Make a local folder with those above it. S3 has no folders, and s3fs would try to make the bucket."""
    if is_local(fs):
        new = list(takewhile(lambda folder: not folder.exists(), (Path(path), *Path(path).parents)))
        fs.makedirs(path, exist_ok=True)
        for folder in new:
            _sync(folder.parent)


@contextmanager
def atomic_file(location: str, folder: str | None = None) -> Iterator[str]:
    """A local path to write to, whose content comes to `location` in one step at the end; after an error it is dropped.

    folder: where a local file is written meanwhile, on the same disk; beside `location` if None. S3 shows an object when all
    of it has come, in one request or in parts; a rename there is a copy and a deletion, so it is for local files alone.
    """
    fs, path = filesystem(location)
    local, home = is_local(fs), path.rpartition("/")[0]
    make_folder(fs, home)
    if folder:
        make_folder(fs, folder)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=(folder or home) if local else None) as own:
        partial = Path(own, path.rpartition("/")[2])
        yield str(partial)
        if not local:
            fs.put_file(str(partial), path)
            return
        _sync(partial)
        partial.replace(path)
        _sync(Path(home))


def write_atomic(location: str, data: bytes) -> None:
    """Write a file that is complete or absent, with the folders above it, in place of one that was there."""
    fs, path = filesystem(location)
    if is_local(fs):
        with atomic_file(location) as partial:
            Path(partial).write_bytes(data)
    else:
        fs.pipe_file(path, data)


def _sync(path: Path) -> None:
    """See that the disk has what was written to a file, or in a folder: a power cut leaves no half of it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def list_files(location: str) -> list[str]:
    """The files below a folder or prefix as they are now, relative to it and sorted; none where there is no such folder.

    For S3 that is one listing, a page for 1,000 objects.
    """
    fs, path = filesystem(location.rstrip("/"))
    return sorted(found[len(path) + 1 :] for found in list_entries(fs, path) if len(found) > len(path))


def list_entries(fs: Any, path: str) -> dict[str, dict[str, Any]]:
    """All files below a folder, at any depth, by their whole path. One that can't be listed is an error, not an empty one."""
    strict = {"on_error": "raise"} if is_local(fs) and fs.exists(path) else {}
    found: dict[str, dict[str, Any]] = fs.find(path, detail=True, **strict)
    return found


@contextmanager
def local_copy(location: str) -> Iterator[Path]:
    """A file or folder on this machine: itself where it is local, else a copy that goes away at the end."""
    fs, path = filesystem(location)
    if is_local(fs):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="nev-") as folder:
        copy = Path(folder, path.rsplit("/", 1)[-1])
        with storage_errors_as(location, "listed"):
            names = list_files(location)
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
    """A folder on this machine to write files in, which lie at `location` when the body has ended well."""
    fs, path = filesystem(location)
    if is_local(fs):
        make_folder(fs, path)
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="nev-") as folder:
        yield Path(folder)
        upload(Path(folder), location)


def upload(source: Path, location: str) -> None:
    """Put a local file or folder at a location on S3: what is in the folder comes below `location`, by the same names."""
    fs, path = filesystem(location)
    files = [file for file in sorted(source.rglob("*")) if file.is_file()] if source.is_dir() else [source]
    for file in files:
        name = "" if file == source else f"/{file.relative_to(source).as_posix()}"
        with storage_errors_as(f"{location}{name}", "written"):
            fs.put_file(str(file), f"{path}{name}")


@contextmanager
def storage_errors_as(
    location: str, doing: str, damaged: str = "", kind: Callable[[str], NevError] = StorageError
) -> Iterator[None]:
    """Turn what storage raises into an error of `kind`: `location` cannot be `doing` ("read", "written"), and what to do."""
    try:
        yield
    except storage_errors() as error:
        absent = doing == "written" and isinstance(error, FileNotFoundError)
        what = "Nothing can be made at this place: choose another." if absent else remedy(error, damaged)
        raise kind(f"{location} cannot be {doing} ({error}). {what}".rstrip()) from error


def storage_errors() -> tuple[type[Exception], ...]:
    """What reading and writing can raise. For `except`, which asks only once something was raised: the imports are slow."""
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError
    from botocore.parsers import ResponseParserError

    return (OSError, pa.ArrowException, BotoCoreError, ResponseParserError, ClientError)


def is_damage(error: BaseException | None) -> bool:
    """Whether the bytes came and are no good: parquet's own words."""
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)


def remedy(error: Exception, damaged: str) -> str:
    """What to do about a storage error: `damaged` where the bytes came and are no good."""
    if is_damage(error):
        return damaged
    if isinstance(error, FileNotFoundError):
        return "It is not there (any more): put it back, or start anew without it."
    if isinstance(error, NotADirectoryError):
        return "A part of that path is a file: give another folder."
    if isinstance(error, PermissionError):
        return "Access is denied: allow it; for s3:// check AWS_PROFILE or AWS_ACCESS_KEY_ID and the bucket's policy."
    return "The storage fails: check disk and network, for s3:// AWS_ENDPOINT_URL and AWS_PROFILE."
