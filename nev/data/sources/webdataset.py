"""Read WebDataset tars as img2dataset writes them: KEY.jpg, KEY.txt, KEY.json, one after another.

https://github.com/rom1504/img2dataset, https://github.com/webdataset/webdataset (the key ends at the first dot of the
file's name). Nothing is extracted to disk, only regular members are looked at, and none is read past its size limit.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from nev.config.data import Limits
from nev.data.rows import Row
from nev.data.sources.common import (
    Source,
    SourceOptions,
    describe_options,
    find_files,
    group_files,
    input_file,
    parent_folder,
    relative_name,
    shared_folder,
)
from nev.storage.files import filesystem, is_local

SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "json", "cls")
MAX_TEXT_BYTES = 2**20
MAX_TAIL_BYTES = 2**16  # tar fills its last record with zeros: of 10 KiB, or what it was told
AHEAD_BYTES = 8 * 2**20  # of a tar on S3: one request
NUMBER = re.compile(r"[+-]?\d+")


def source(inputs: Iterable[str | Path], options: SourceOptions) -> Source:
    """The tars that `inputs` name, in parts of whole tars (see `read`). Raises ConfigError as `find_files` does."""
    files = find_files(inputs, SUFFIXES)
    # What uids start from, where the tars' names are in them.
    root = shared_folder(parent_folder(file.location) for file in files) if options.tar_in_uid else ""
    return Source(
        group_files(files, options.part_bytes),
        partial(read, options=options, root=root),
        sum(file.size for file in files),
        describe_options("webdataset", options, root=root),
    )


def read(files: Iterable[str], options: SourceOptions, root: str = "") -> Iterator[Row]:
    """Yield one row a key, in the order of the files (paths or s3:// URLs).

    uid: `uid` of the JSON, else the key. caption: `captions` of the JSON, else its `caption`, else the text file.
    label: `label` of the JSON or the .cls member, where it is a number, else it is the label_name; label_name and, named by
    `options.score`, score: of the JSON. With `options.tar_in_uid` a uid is 'TAR/uid', the tar's name from `root` on. A
    sample whose `status` is not "success" is rejected with that status, and a tar without a sample as one row. Raises
    ConfigError for a file that is not a whole tar.
    """
    for path in files:
        tar = relative_name(root, path)
        rows = 0
        for key, parts in _samples(path, options):
            row = _row(key, parts, options)
            rows += 1
            yield {**row, "uid": f"{tar}/{row['uid']}"} if options.tar_in_uid else row
        if not rows:
            yield {"uid": tar, "image": None, "caption": None, "reject": f"tar without KEY.{', KEY.'.join(IMAGES)}"}


def _samples(path: str, options: SourceOptions) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """(key, content by extension): neighbours of one key. Where an extension comes again, another sample of that key begins."""
    last = ""
    parts: dict[str, bytes | None] = {}
    for key, extension, content in _members(path, options.limits, TEXTS + options.extra):
        if parts and (key != last or extension in parts):
            yield last, parts
            parts = {}
        last = key
        parts[extension] = content
    if parts:
        yield last, parts


def _members(path: str, limits: Limits, texts: tuple[str, ...]) -> Iterator[tuple[str, str, bytes | None]]:
    """(key, extension, content) of the members that are used; content is None for one above its limit."""
    with (
        input_file(path, "a whole tar file"),
        _open(path) as file,
        tarfile.open(fileobj=file, mode="r:*", tarinfo=_BoundedHeader) as tar,
    ):
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            extension = extension.lower()
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header: some kilobytes a picture
            if not member.isreg() or not stem or extension not in IMAGES + texts:
                continue
            limit = limits.max_bytes if extension in IMAGES else MAX_TEXT_BYTES
            stream = tar.extractfile(member) if member.size <= limit else None
            yield f"{folder}/{stem}" if folder else stem, extension, stream.read() if stream else None
        # tarfile takes a broken header, or a cut between two members, for the end. The true end is a block of zeros.
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"neither a header nor the end mark at byte {tar.offset}")
        # Zeros are what a download leaves that was cut off in a file of the whole length, and a second tar may follow the first.
        rest = tar.fileobj.read(MAX_TAIL_BYTES + 1)
        if len(rest) > MAX_TAIL_BYTES or rest.strip(b"\0"):
            raise tarfile.ReadError(f"the end mark at byte {tar.offset} is not at the end")


class _BoundedHeader(tarfile.TarInfo):
    """A header that may not go on for long: tarfile reads what belongs to it (long names, attributes) into memory, whole."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if not self.isreg() and self.size > MAX_TEXT_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


def _open(location: str) -> Any:
    fs, path = filesystem(location)
    if is_local(fs):
        return open(path, "rb")  # fsspec's own wrapper costs a Python call a read
    return fs.open(path, "rb", cache_type="readahead", block_size=AHEAD_BYTES)


def _row(key: str, parts: dict[str, bytes | None], options: SourceOptions) -> Row:
    row: Row = {"uid": key, "image": None, "caption": None}
    images = [extension for extension in parts if extension in IMAGES]
    if images:
        row["image"] = parts[images[0]]
    if None in parts.values():
        row["reject"] = "member over its size limit"
        return row
    try:
        facts: Any = json.loads(parts.get("json") or b"{}")
        if not isinstance(facts, dict):
            raise TypeError(f"a JSON object is needed, not {type(facts).__name__}")
        text = (parts.get("txt") or b"").decode()
        row["uid"] = str(facts.get("uid") or key)
        own = text.splitlines() if options.caption_lines else text
        row["caption"] = _caption(facts.get("captions") or facts.get("caption") or own)
        row["label"], name = _label(facts["label"] if "label" in facts else parts.get("cls"))
        row["label_name"] = name if facts.get("label_name") is None else str(facts["label_name"])
        if score := options.score:
            row["score"] = None if facts.get(score) is None else float(facts[score])
        if options.extra:
            row["extra"] = {name: parts[name] if name in parts else facts.get(name) for name in options.extra}
    # A number may be too large, and lists may be nested too deep; JSONDecodeError and UnicodeDecodeError are ValueErrors.
    except (ValueError, TypeError, OverflowError, RecursionError):
        row["reject"] = "unreadable json, txt or cls"
        return row
    if facts.get("status", "success") != "success":
        row["reject"] = f"status {facts['status']}"
    elif not images:
        row["reject"] = "no image member"
    return row


def _caption(given: Any) -> str | list[str]:
    if isinstance(given, str):
        return given
    if isinstance(given, list) and all(one is None or isinstance(one, str) for one in given):
        return [one for one in given if one]
    raise TypeError(f"a caption is a string or a list of strings, not {given!r}")


def _label(given: Any) -> tuple[int | None, str | None]:
    """(label, name): a class is given by its number or, as text that is none, by its name."""
    if given is None:
        return None, None
    text = given.decode() if isinstance(given, bytes) else given
    if isinstance(text, str) and not NUMBER.fullmatch(text.strip()):
        return None, text.strip() or None
    label = int(text)
    if isinstance(text, bool | float) and (isinstance(text, bool) or label != text):
        raise TypeError(f"a label is a whole number or a name, not {text}")
    if not -(2**63) <= label < 2**63:
        raise OverflowError("a label has 64 bits")
    return label, None
