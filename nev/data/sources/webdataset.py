"""Reads WebDataset tars as img2dataset writes them: KEY.jpg, KEY.txt, KEY.json, one after another.

https://github.com/rom1504/img2dataset, https://github.com/webdataset/webdataset (the key ends at the first dot of the file's
name). Nothing is extracted to disk. Only regular members are read, and none beyond its size limit.
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
MAX_TAIL_BYTES = 2**16  # zeros after the end mark: tar fills its last record, which has 10 KiB by default
AHEAD_BYTES = 8 * 2**20  # size of one request to a tar on S3
NUMBER = re.compile(r"[+-]?\d+")


def source(inputs: Iterable[str | Path], options: SourceOptions) -> Source:
    """The source of the tars in `inputs`. A part is some whole tars (see `read`). Raises ConfigError as `find_files` does."""
    files = find_files(inputs, SUFFIXES)
    # With `tar_in_uid`, names of tars in uids are relative to this folder.
    root = shared_folder(parent_folder(file.location) for file in files) if options.tar_in_uid else ""
    return Source(
        group_files(files, options.part_bytes),
        partial(read, options=options, root=root),
        sum(file.size for file in files),
        describe_options("webdataset", options, root=root),
    )


def read(files: Iterable[str], options: SourceOptions, root: str = "") -> Iterator[Row]:
    """Yield one row for each key, in the order of the files (paths or s3:// URLs).

    uid: `uid` of the JSON, else the key. With `options.tar_in_uid` 'TAR/uid', with the tar's name relative to `root`.
    caption: `captions` of the JSON, else `caption` of the JSON, else the text file.
    label: `label` of the JSON, else the .cls member. Text that is not a number becomes the label_name.
    label_name: of the JSON.
    score: the JSON key `options.score`.

    A sample whose `status` is not "success" is rejected with that status. A tar without a sample gives one rejected row.
    Raises ConfigError for a file that is not a complete tar.
    """
    for path in files:
        tar = relative_name(root, path)
        rows = 0
        for key, parts in _samples(path, options):
            row = _row(key, parts, options, path)
            rows += 1
            yield {**row, "uid": f"{tar}/{row['uid']}"} if options.tar_in_uid else row
        if not rows:
            reject = f"tar without KEY.{', KEY.'.join(IMAGES)}"
            yield {"uid": tar, "image": None, "caption": None, "source": path, "reject": reject}


def _samples(path: str, options: SourceOptions) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """(key, content by extension) of each sample: consecutive members with one key. A repeated extension starts a new sample."""
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
    """(key, extension, content) of the members that are used. The content of a member above its size limit is None."""
    with (
        input_file(path, "a whole tar file"),
        _open(path) as file,
        tarfile.open(fileobj=file, mode="r:*", tarinfo=_BoundedHeader) as tar,
    ):
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            extension = extension.lower()
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header, some kilobytes a picture
            if not member.isreg() or not stem or extension not in IMAGES + texts:
                continue
            limit = limits.max_bytes if extension in IMAGES else MAX_TEXT_BYTES
            stream = tar.extractfile(member) if member.size <= limit else None
            yield f"{folder}/{stem}" if folder else stem, extension, stream.read() if stream else None
        # tarfile treats a broken header, or a truncation between two members, as the end. The true end is a block of zeros.
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"neither a header nor the end mark at byte {tar.offset}")
        # More zeros come from an interrupted download into a file of the full length. Other bytes may be a second tar.
        rest = tar.fileobj.read(MAX_TAIL_BYTES + 1)
        if len(rest) > MAX_TAIL_BYTES or rest.strip(b"\0"):
            raise tarfile.ReadError(f"the end mark at byte {tar.offset} is not at the end")


class _BoundedHeader(tarfile.TarInfo):
    """A header of limited size: tarfile reads its extensions (long names, attributes) into memory at once."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if not self.isreg() and self.size > MAX_TEXT_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


def _open(location: str) -> Any:
    fs, path = filesystem(location)
    if is_local(fs):
        return open(path, "rb")  # fsspec's wrapper would add a Python call to each read
    return fs.open(path, "rb", cache_type="readahead", block_size=AHEAD_BYTES)


def _row(key: str, parts: dict[str, bytes | None], options: SourceOptions, tar: str) -> Row:
    row: Row = {"uid": key, "image": None, "caption": None, "source": f"{tar}/{key}"}
    images = [extension for extension in parts if extension in IMAGES]
    if images:
        row |= {"image": parts[images[0]], "source": f"{tar}/{key}.{images[0]}"}
    if None in parts.values():
        row["reject"] = "member over its size limit"
        return row
    try:
        record: Any = json.loads(parts.get("json") or b"{}")
        if not isinstance(record, dict):
            raise TypeError(f"a JSON object is needed, not {type(record).__name__}")
        text = (parts.get("txt") or b"").decode()
        row["uid"] = str(record.get("uid") or key)
        text_file = text.splitlines() if options.caption_lines else text
        row["caption"] = _parse_caption(record.get("captions") or record.get("caption") or text_file)
        row["label"], name = _parse_label(record["label"] if "label" in record else parts.get("cls"))
        row["label_name"] = name if record.get("label_name") is None else str(record["label_name"])
        if score := options.score:
            row["score"] = None if record.get(score) is None else float(record[score])
        if options.extra:
            row["extra"] = {name: parts[name] if name in parts else record.get(name) for name in options.extra}
    # OverflowError: a number is too large. RecursionError: lists are nested too deep. Errors of JSON and UTF-8 are ValueErrors.
    except (ValueError, TypeError, OverflowError, RecursionError):
        row["reject"] = "unreadable json, txt or cls"
        return row
    if record.get("status", "success") != "success":
        row["reject"] = f"status {record['status']}"
    elif not images:
        row["reject"] = "no image member"
    return row


def _parse_caption(value: Any) -> str | list[str]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(item is None or isinstance(item, str) for item in value):
        return [item for item in value if item]
    raise TypeError(f"a caption is a string or a list of strings, not {value!r}")


def _parse_label(value: Any) -> tuple[int | None, str | None]:
    """(label, name) of a class. A number, or text that spells one, is the label; other text is the name."""
    if value is None:
        return None, None
    text = value.decode() if isinstance(value, bytes) else value
    if isinstance(text, str) and not NUMBER.fullmatch(text.strip()):
        return None, text.strip() or None
    label = int(text)
    if isinstance(text, bool | float) and (isinstance(text, bool) or label != text):
        raise TypeError(f"a label is a whole number or a name, not {text}")
    if not -(2**63) <= label < 2**63:
        raise OverflowError("a label has 64 bits")
    return label, None
