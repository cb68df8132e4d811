"""Reads pictures in folders, at any depth, on disks or on S3. They have no captions.

A hash of a picture's name decides whether a part ends behind that picture. So a picture that is added or removed changes its own
part alone, and the other parts of a large folder need no work again.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import NamedTuple

from nev.common.location import S3
from nev.config.base import ConfigError
from nev.config.data import Limits
from nev.data.rows import Row
from nev.data.sources.common import (
    Part,
    Source,
    SourceOptions,
    describe_options,
    hash_content,
    input_file,
    parent_folder,
    relative_name,
    shared_folder,
)
from nev.data.sources.folder import IMAGES, fill_in
from nev.data.sources.input_files import File, find_files
from nev.storage.files import PARALLEL_REQUESTS, filesystem

PART_PICTURES, MOST_PICTURES = 2048, 8192  # of a part: on average, and at most
WILD = "*?["


class Pictures(NamedTuple):
    """The content of a part.

    names: of the files, relative to the source's root.
    sizes: in bytes.
    """

    names: list[str]
    sizes: list[int]


def source(inputs: Iterable[str | Path], options: SourceOptions) -> Source:
    """The source of the pictures in `inputs`: files, folders and patterns, all local or all on S3. One row a file, by path.

    uid: the path of the file, relative to the common folder of all inputs.

    Raises ConfigError as `find_files` does. The names and sizes of all files are in memory at once.
    """
    patterns = list(map(str, inputs))
    unread = Counter[str]()
    files = find_files(patterns, IMAGES, unread)
    if len({file.location.startswith(S3) for file in files}) > 1:
        raise ConfigError("pictures lie on this machine or on S3, not on both: give one command for each")
    root = shared_folder(_folder_of(pattern, files) for pattern in patterns)
    parts = [
        Part(
            hash_content(group),
            Pictures([relative_name(root, file.location) for file in group], [file.size for file in group]),
        )
        for group in _divide(files, root)
    ]
    return Source(
        parts,
        partial(read, root=root, limits=options.limits),
        sum(file.size for file in files),
        describe_options("folder", options, root=root),
        unread,
    )


def _folder_of(pattern: str, files: list[File]) -> str:
    """The folder of an input, absolute: a picture that is added below it changes no uid."""
    location = pattern.rstrip("/") if pattern.startswith(S3) else os.path.abspath(pattern)  # noqa: PTH100 - as `find_files`
    if any(file.location == location for file in files):
        return parent_folder(location)
    return "/".join(takewhile(lambda name: not any(sign in name for sign in WILD), location.split("/")))


def _divide(files: list[File], root: str) -> Iterator[list[File]]:
    group: list[File] = []
    for file in files:
        group.append(file)
        digest = hashlib.blake2b(relative_name(root, file.location).encode(errors="surrogateescape"), digest_size=8)
        if not int.from_bytes(digest.digest(), "big") % PART_PICTURES or len(group) == MOST_PICTURES:
            yield group
            group = []
    if group:
        yield group


def read(pictures: Pictures, root: str, limits: Limits) -> Iterator[Row]:
    """Yield a row for each picture, with the bytes of its file, or why the file cannot be used.

    Raises ConfigError where S3 does not answer: the file may be good.
    """
    if root.startswith(S3):
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            waiting = zip(pictures.names, pictures.sizes, strict=True)
            while some := list(islice(waiting, 4 * PARALLEL_REQUESTS)):
                yield from pool.map(partial(_fetch, root=root, limits=limits), some)
        return
    for name in pictures.names:
        row = _make_row(root, name)
        fill_in(row, row["source"], root, limits)
        yield row


def _make_row(root: str, name: str) -> Row:
    return {"uid": name, "image": None, "caption": None, "source": f"{root}/{name}"}


def _fetch(entry: tuple[str, int], root: str, limits: Limits) -> Row:
    name, size = entry
    row = _make_row(root, name)
    if size > limits.max_bytes:
        row["reject"] = f"image over {limits.max_bytes} bytes"
        return row
    fs, path = filesystem(row["source"])
    with input_file(row["source"], "readable"):
        try:
            row["image"] = fs.cat_file(path)
        except FileNotFoundError:
            row["reject"] = "no such file"
    return row
