"""What a location is: a path, or `s3://BUCKET/PREFIX`. Any other URL is refused by name."""

from __future__ import annotations

import os
import re

from nev.common.errors import NevError

S3 = "s3://"
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # two characters at least: C:/ is a drive
OF_S3 = ("s3", "s3a", "s3n")
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


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


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern with {FIRST..LAST} or {ONE,OTHER} stands for, as a shell writes them; itself without any.

    A number with leading zeros has as many digits in every name. Raises LocationError for a range that is empty.
    """
    match = BRACES.search(pattern)
    if not match:
        return [pattern]
    first, last, listed = match[1], match[2], match[3]
    if listed is None and int(first) > int(last):
        raise LocationError(f"{hide_password(pattern)}: {match[0]} has no number in it: write {{FIRST..LAST}}")
    names = (
        listed.split(",")
        if listed is not None
        else (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    )
    return [
        whole for name in names for whole in expand_braces(pattern[: match.start()] + name + pattern[match.end() :])
    ]


def absolute_location(location: str) -> str:
    """The location for processes in other folders: an absolute path, without ~, or the URL. Raises LocationError."""
    if check_location(location).startswith(S3):
        return location.rstrip("/")
    return os.path.abspath(os.path.expanduser(location))  # noqa: PTH100 - links stay as they are named
