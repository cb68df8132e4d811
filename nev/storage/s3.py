"""S3 through s3fs, with bounded retries that are logged. Import this module late: botocore is slow to import.

botocore retries a request that is throttled, answered by 5xx or not answered, up to REQUEST_TRIES times (AWS_MAX_ATTEMPTS), after
random pauses that grow to 20 s. s3fs retries a body that ends too soon or stalls, and requests that botocore gave up as throttled
or broken off, up to BODY_TRIES times. So a read is tried at most as often as the product of both. (On the wire there may be twice
as many where connections are dropped, since aiohttp opens a second connection before it gives up.)
Each failed try is a warning of the logger `nev.storage`.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from typing import Any

from aiobotocore.session import AioSession
from botocore.configprovider import ConfiguredEndpointProvider
from botocore.exceptions import HTTPClientError
from botocore.session import Session
from s3fs import S3FileSystem

from nev.config.base import ConfigError
from nev.storage.traffic import count_read

REQUEST_TRIES = 6
BODY_TRIES = 3
CONNECT_SECONDS = 10
RENEWED = ("iam-role", "container-role", "assume-role-with-web-identity")  # origins of keys, as botocore names them
SILENT_SECONDS = 20  # time without a byte after which a connection counts as lost

log = logging.getLogger("nev.storage")


class BoundedS3(S3FileSystem):  # type: ignore[misc]
    """s3fs with one loop of retries. s3fs retries inside `_call_s3` and around it; an error after the inner retries is final."""

    retries = BODY_TRIES

    async def _call_s3(self, *args: Any, **kwargs: Any) -> Any:
        try:
            answer = await super()._call_s3(*args, **kwargs)
        except HTTPClientError as error:
            raise OSError(errno.EIO, str(error)) from error
        if args[0] == "get_object":
            count_read(answer.get("ContentLength", 0))
        return answer


def s3_filesystem() -> S3FileSystem:
    """The S3 filesystem of this process, shared by all threads. (fsspec would make one for each thread.)"""
    return _filesystem(os.getpid())


@functools.lru_cache(maxsize=1)
def _filesystem(process: int) -> S3FileSystem:
    """Make the filesystem. process: part of the cache's key, because the event loop does not survive a fork."""
    _log_lost_bodies()
    session = AioSession()
    session.register("needs-retry.s3", _log_failed_try)
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
    tries = os.environ.get("AWS_MAX_ATTEMPTS", str(REQUEST_TRIES))
    if not tries.isdecimal() or int(tries) < 1:
        raise ConfigError(f"AWS_MAX_ATTEMPTS={tries}: set it to the number of tries of a request, 1 or more")
    return int(tries)


def _log_failed_try(
    operation: Any, attempts: int, request_dict: Any, response: Any = None, caught_exception: Any = None, **_: Any
) -> None:
    """Log a failed try of a request. botocore calls this after every try."""
    status = response[0].status_code if response else 0
    if caught_exception is not None or status >= 500 or status == 429:
        reason = f"status {status}" if caught_exception is None else repr(caught_exception)
        log.warning("%s %s: try %d failed: %s", operation.name, request_dict["url"], attempts, reason)


@functools.cache
def _log_lost_bodies() -> None:
    """Log the retries of s3fs as warnings. s3fs logs them at DEBUG; its other DEBUG records stay hidden."""
    s3fs_log = logging.getLogger("s3fs")
    debug = s3fs_log.isEnabledFor(logging.DEBUG)

    def warn(record: logging.LogRecord) -> bool:
        if record.msg == "Retryable error: %s":
            log.warning("a response was cut off or stalled: %s", record.getMessage())
        return debug or record.levelno > logging.DEBUG

    s3fs_log.setLevel(logging.DEBUG)
    s3fs_log.addFilter(warn)


def object_store_options() -> dict[str, str]:
    """What a library in Rust (LanceDB) needs to find the same S3 as this module: keys as `object_store` names them.

    Keys of a role (machine, container, web identity) expire, and such a library renews them itself: none are handed over.
    """
    session = Session()
    options = {"region": session.get_config_variable("region"), "endpoint": _endpoint(session)}
    credentials = session.get_credentials()
    if credentials and credentials.method not in RENEWED:
        keys = credentials.get_frozen_credentials()
        options |= {
            "aws_access_key_id": keys.access_key,
            "aws_secret_access_key": keys.secret_key,
            "aws_session_token": keys.token,
        }
    if (options["endpoint"] or "").startswith("http://"):
        options["allow_http"] = "true"
    return {name: value for name, value in options.items() if value}


def _endpoint(session: Session) -> str | None:
    """The address of S3 from the environment or the profile, as botocore's clients find it. None: Amazon's."""
    if session.get_config_variable("ignore_configured_endpoint_urls"):
        return None
    provider = ConfiguredEndpointProvider(session.full_config, session.get_scoped_config(), client_name="s3")
    endpoint: str | None = provider.provide()
    return endpoint
