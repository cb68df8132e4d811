"""What a location is: a path, or `s3://BUCKET/PREFIX`. Any other URL is refused by name."""

from __future__ import annotations

import os
import re

from nev.common.errors import NevError

S3 = "s3://"
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # two characters at least: C:/ is a drive
OF_S3 = ("s3", "s3a", "s3n")


class LocationError(NevError, ValueError):
    """A location that nev cannot read or write."""


def hide_password(location: str) -> str:
    """The location without user and password."""
    return re.sub(r"//[^/]*@", "//", location)


def check_location(location: str) -> str:
    """The location as it is. Raises LocationError for a URL of another kind than s3://, and for s3:// without a bucket."""
    match = URL.match(location)
    if not match:
        return location
    scheme = match[1]
    shown = hide_password(location)
    if location.startswith(S3):
        if location.removeprefix(S3).startswith("/") or not location.removeprefix(S3):
            raise LocationError(f"{shown}: names no bucket; write s3://BUCKET/PREFIX")
        return location
    if scheme.lower() in OF_S3:
        rest = location[match.end() :].lstrip("/")
        raise LocationError(f"{shown}: write {S3}{rest}")
    if scheme.lower() == "file":
        raise LocationError(f"{shown}: write the path, without {scheme}:")
    raise LocationError(
        f"{shown}: nev reads and writes paths and s3://BUCKET/PREFIX, and not {scheme}:. Most stores speak S3, too "
        "(AWS_ENDPOINT_URL names the server); else mount the store, or copy the files"
    )


def absolute_location(location: str) -> str:
    """The location for processes in other folders: an absolute path, without ~, or the URL. Raises LocationError."""
    if check_location(location).startswith(S3):
        return location.rstrip("/")
    return os.path.abspath(os.path.expanduser(location))  # noqa: PTH100 - links stay as they are named
