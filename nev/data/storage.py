"""Local paths and `s3://` URLs behind one door: fsspec's filesystems (s3fs for S3)."""

from __future__ import annotations

import os
from typing import Any

from fsspec.core import url_to_fs


def filesystem(location: str) -> tuple[Any, str]:
    """The fsspec filesystem of a path or URL, and the path inside it. Local paths become absolute."""
    fs, path = url_to_fs(os.path.expanduser(location))
    return fs, path


def join(location: str, *parts: str) -> str:
    """`location/part/...`, for paths and URLs alike."""
    return "/".join([location.rstrip("/"), *parts])
