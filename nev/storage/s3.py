"""S3 through s3fs, with retries that are bounded and told of. Imported late: botocore is slow to import.

Who retries what: botocore a request that is throttled, answered by 5xx or left without an answer, up to REQUEST_TRIES
times (AWS_MAX_ATTEMPTS), after random pauses that grow to 20 s; s3fs a body that ends too soon or stalls, and once more what
botocore gave up as throttled or cut off, up to BODY_TRIES times. So no read is tried more often than the product of both
(twice that on the wire where connections are dropped: aiohttp makes a second one before it gives up).
Each failed try is a warning of the logger `nev.storage`.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from typing import Any

from aiobotocore.session import AioSession
from botocore.exceptions import HTTPClientError
from s3fs import S3FileSystem

from nev.config.base import ConfigError

REQUEST_TRIES = 6
BODY_TRIES = 3
CONNECT_SECONDS = 10
SILENT_SECONDS = 20  # without a byte: then the connection counts as lost

log = logging.getLogger("nev.storage")


class BoundedS3(S3FileSystem):  # type: ignore[misc]
    """s3fs tries a read again both in here and around it: what failed in here for good is no reason to begin anew."""

    retries = BODY_TRIES

    async def _call_s3(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super()._call_s3(*args, **kwargs)
        except HTTPClientError as error:
            raise OSError(errno.EIO, str(error)) from error


def s3_filesystem() -> S3FileSystem:
    """The S3 filesystem of this process: one for all threads, where fsspec would make one for each."""
    return _filesystem(os.getpid())


@functools.lru_cache(maxsize=1)
def _filesystem(process: int) -> S3FileSystem:
    """`process`, because the filesystem's event loop does not survive a fork."""
    _tell_of_lost_bodies()
    session = AioSession()
    session.register("needs-retry.s3", _tell_of_failed_try)
    return BoundedS3(
        session=session,
        config_kwargs={
            "retries": {"mode": "standard", "total_max_attempts": _request_tries()},
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": SILENT_SECONDS,
        },
        use_listings_cache=False,  # other processes write while this one runs
        skip_instance_cache=True,
    )


def _request_tries() -> int:
    given = os.environ.get("AWS_MAX_ATTEMPTS", str(REQUEST_TRIES))
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"AWS_MAX_ATTEMPTS={given}: it says how often a request is tried: a number from 1")
    return int(given)


def _tell_of_failed_try(
    operation: Any, attempts: int, request_dict: Any, response: Any = None, caught_exception: Any = None, **_: Any
) -> None:
    """botocore's event after every try of a request, whether or not it will be tried again."""
    status = response[0].status_code if response else 0
    if caught_exception is not None or status >= 500 or status == 429:
        reason = f"status {status}" if caught_exception is None else repr(caught_exception)
        log.warning("%s %s: try %d failed: %s", operation.name, request_dict["url"], attempts, reason)


@functools.cache
def _tell_of_lost_bodies() -> None:
    """s3fs tells at DEBUG alone of what it tries again: make that a warning, and let the rest stay unsaid."""
    theirs = logging.getLogger("s3fs")
    talkative = theirs.isEnabledFor(logging.DEBUG)

    def watch(record: logging.LogRecord) -> bool:
        if record.msg == "Retryable error: %s":
            log.warning("an answer was cut off or stalled: %s", record.getMessage())
        return talkative or record.levelno > logging.DEBUG

    theirs.setLevel(logging.DEBUG)
    theirs.addFilter(watch)
