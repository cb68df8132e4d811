"""Local paths and `s3://` URLs behind one door: fsspec's filesystems (s3fs for S3).

Endpoint, region and credentials of S3 come from where botocore looks for them: AWS_ENDPOINT_URL, AWS_PROFILE,
AWS_ACCESS_KEY_ID and the rest, the profile's file, the machine's role.

Who retries what: botocore a request that is throttled, answered by 5xx or left without an answer, up to REQUEST_TRIES
times (AWS_MAX_ATTEMPTS), after random pauses that grow to 20 s; s3fs a body that ends too soon or stalls, and once more
what botocore gave up as throttled or cut off, up to BODY_TRIES times. Each failed try is a warning of the logger `nev.storage`.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import pyarrow as pa
from fsspec.core import url_to_fs

REQUEST_TRIES = 6
BODY_TRIES = 3
CONNECT_SECONDS = 10
SILENT_SECONDS = 20  # without a byte: then the connection counts as lost

log = logging.getLogger("nev.storage")


def filesystem(location: str) -> tuple[Any, str]:
    """The fsspec filesystem of a path or URL, and the path inside it. Local paths become absolute."""
    if location.startswith("s3://"):
        return _s3(os.getpid()), location.removeprefix("s3://")
    fs, path = url_to_fs(os.path.expanduser(location))
    return fs, path


def join(location: str, *parts: str) -> str:
    """`location/part/...`, for paths and URLs alike."""
    return "/".join([location.rstrip("/"), *parts])


def is_local(fs: Any) -> bool:
    """Whether a filesystem is that of this machine."""
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def open_parquet(fs: Any, path: str, size: int | None = None) -> Any:
    """A parquet file for reading. Each read of a remote one is one request for exactly its bytes: pyarrow knows what it needs.

    `size` where it is known saves the request that asks for it (and for the ETag, by which a file that changes is noticed).
    """
    return fs.open(path, "rb") if is_local(fs) else fs.open(path, "rb", cache_type="none", size=size)


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
        return "Allow reading it; for s3:// check AWS_PROFILE or AWS_ACCESS_KEY_ID and the bucket's policy."
    return "The storage does not give it: check disk or network, for s3:// AWS_ENDPOINT_URL too, and start again."


@functools.lru_cache(maxsize=1)
def _s3(process: int) -> Any:
    """One S3 filesystem a process (fsspec would make one a thread). Its event loop does not survive a fork, hence `process`."""
    from aiobotocore.session import AioSession
    from s3fs import S3FileSystem

    _tell_of_lost_bodies()
    session = AioSession()
    session.register("needs-retry.s3", _tell_of_failed_try)
    tries = int(os.environ.get("AWS_MAX_ATTEMPTS", REQUEST_TRIES))
    fs = S3FileSystem(
        session=session,
        config_kwargs={
            "retries": {"mode": "standard", "total_max_attempts": tries},
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": SILENT_SECONDS,
        },
        use_listings_cache=False,  # other processes write while this one runs
        skip_instance_cache=True,
    )
    fs.retries = BODY_TRIES
    return fs


def _tell_of_failed_try(
    operation: Any, attempts: int, request_dict: Any, response: Any = None, caught_exception: Any = None, **_: Any
) -> None:
    """botocore's event after every try of a request, whether or not it will be tried again."""
    status = response[0].status_code if response else 0
    if caught_exception is not None or status >= 500 or status == 429:
        reason = f"status {status}" if caught_exception is None else repr(caught_exception)
        log.warning("%s %s: try %d failed: %s", operation.name, request_dict["url"], attempts, reason)


def _tell_of_lost_bodies() -> None:
    """s3fs tells of the bodies that it fetches again at DEBUG alone: make that a warning, and let the rest stay unsaid."""
    theirs = logging.getLogger("s3fs")
    talkative = theirs.isEnabledFor(logging.DEBUG)

    def watch(record: logging.LogRecord) -> bool:
        if record.msg == "Retryable error: %s":
            log.warning("lost the body of an answer, or the answer: %s", record.getMessage())
        return talkative or record.levelno > logging.DEBUG

    theirs.setLevel(logging.DEBUG)
    theirs.addFilter(watch)
