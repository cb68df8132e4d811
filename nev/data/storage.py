"""Local paths and `s3://` URLs behind one door: fsspec's filesystems (s3fs for S3, see `nev.data.s3`).

Endpoint, region and credentials of S3 come from where botocore looks for them: AWS_ENDPOINT_URL, AWS_PROFILE,
AWS_ACCESS_KEY_ID and the rest, the profile's file, the machine's role.
"""

from __future__ import annotations

import os
from typing import Any

import pyarrow as pa
from fsspec.core import url_to_fs


def filesystem(location: str) -> tuple[Any, str]:
    """The fsspec filesystem of a path or URL, and the path inside it. Local paths become absolute."""
    if location.startswith("s3://"):
        from nev.data.s3 import s3_filesystem

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
        fs.makedirs(path, exist_ok=True)


def storage_errors() -> tuple[type[Exception], ...]:
    """What reading and writing can raise. For `except`, which asks only once something was raised: the imports are slow."""
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError
    from botocore.parsers import ResponseParserError

    return (OSError, pa.ArrowException, BotoCoreError, ResponseParserError, ClientError)


def remedy(error: Exception, damaged: str) -> str:
    """What to do about a storage error: `damaged` where the bytes came and are no good."""
    if isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None):  # parquet's own words
        return damaged
    if isinstance(error, FileNotFoundError):
        return "It is not there (any more): put it back, or start anew without it."
    if isinstance(error, PermissionError):
        return "Access is denied: allow it; for s3:// check AWS_PROFILE or AWS_ACCESS_KEY_ID and the bucket's policy."
    return "The storage fails: check disk and network, for s3:// AWS_ENDPOINT_URL and AWS_PROFILE."
