"""Reads WebDataset tars as img2dataset writes them: KEY.jpg, KEY.txt, KEY.json, one after another.

https://github.com/rom1504/img2dataset, https://github.com/webdataset/webdataset. Nothing is extracted to disk. Only regular
members are read, and none beyond its size limit. `nev.data.sources.samples` has the rules of their names.
"""

from __future__ import annotations

import io
import json
import mmap
import re
import tarfile
from collections import Counter
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
    group_files,
    input_file,
    parent_folder,
    relative_name,
    shared_folder,
)
from nev.data.sources.input_files import find_files
from nev.data.sources.samples import IMAGES, Member, Sample, find_faults, group_members, split_name
from nev.storage.files import filesystem, is_local

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
WRITTEN = ("jpg", "jpeg", "png", "webp")  # by img2dataset
TEXTS = ("txt", "json", "cls")
MAX_TEXT_BYTES = 2**20
MAX_TAIL_BYTES = 2**16  # zeros after the end mark: tar fills its last record, which has 10 KiB by default
AHEAD_BYTES = 8 * 2**20  # size of one request to a tar on S3
NUMBER = re.compile(r"[+-]?\d+")


def source(inputs: Iterable[str | Path], options: SourceOptions) -> Source:
    """The source of the tars in `inputs`. A part is some whole tars (see `read`). Raises ConfigError as `find_files` does."""
    unread = Counter[str]()
    files = find_files(inputs, SUFFIXES, unread)
    # With `tar_in_uid`, names of tars in uids are relative to this folder.
    root = shared_folder(parent_folder(file.location) for file in files) if options.tar_in_uid else ""
    return Source(
        group_files(files, options.part_bytes),
        partial(read, options=options, root=root),
        sum(file.size for file in files),
        describe_options("webdataset", options, root=root),
        unread,
    )


def read(files: Iterable[str], options: SourceOptions, root: str = "", in_place: bool = False) -> Iterator[Row]:
    """Yield one row for each key, in the order of the files (paths or s3:// URLs).

    in_place: pictures of a local tar are views of the file, of which nothing is read. The tar must not be compressed.

    uid: `uid` of the JSON, else the key. With `options.tar_in_uid` 'TAR/uid', with the tar's name relative to `root`.
    caption: what `options.columns.caption` names, a key of the JSON or `txt`; else `captions` of the JSON, its `caption`, or the
        text file.
    label: `label` of the JSON, else the .cls member. Text that is not a number becomes the label_name.
    label_name: of the JSON.
    score: the JSON key `options.score`.

    A sample whose `status` is not "success" is rejected with that status. A tar without a sample gives one rejected row.
    Raises ConfigError for a file that is not a complete tar.
    """
    for path in files:
        tar = relative_name(root, path)
        rows = 0
        members = _members(path, options.limits, TEXTS + options.extra, in_place)
        for sample in find_faults(group_members(members), options.captioned):
            row = _row(sample, options, path)
            rows += 1
            yield {**row, "uid": f"{tar}/{row['uid']}"} if options.tar_in_uid else row
            for extension in _order_pictures(sample.parts)[1:]:
                place, reject = f"{sample.key}.{extension}", "another picture of its sample"
                yield {
                    "uid": f"{tar}/{place}",
                    "image": None,
                    "caption": None,
                    "source": f"{path}/{place}",
                    "reject": reject,
                }
        if not rows:
            reject = "tar without a picture, KEY.jpg or another"
            yield {"uid": tar, "image": None, "caption": None, "source": path, "reject": reject}


def _members(path: str, limits: Limits, texts: tuple[str, ...], in_place: bool) -> Iterator[Member]:
    """The regular members, but for those whose name begins with a dot. Bytes of a name that are no UTF-8 are escaped."""
    known = sorted({*IMAGES, *texts}, key=len, reverse=True)  # of `seg.png` and `png` the longer one counts
    with (
        input_file(path, "a whole tar file"),
        _open(path) as file,
        tarfile.open(fileobj=file, mode="r:" if in_place else "r:*", tarinfo=_BoundedHeader) as tar,
    ):
        mapped = _map(file) if in_place else None
        for member in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header, some kilobytes a picture
            if member.name.rpartition("/")[2].startswith("."):
                continue
            if member.issym() or member.islnk():
                yield Member(
                    f"{_escape(member.name)}.link", "", None
                )  # its file may be anywhere in the tar, or outside
            if not member.isreg():
                continue
            name, extension = split_name(_escape(member.name), known)
            limit = limits.max_bytes if extension in IMAGES else MAX_TEXT_BYTES
            if not extension or member.size > limit:
                yield Member(name, extension, None)
            elif mapped and extension in IMAGES and not member.issparse():
                view = mapped[member.offset_data : member.offset_data + member.size]
                yield Member(name, extension, view, member.offset_data)
            else:
                stream = tar.extractfile(member)
                assert stream  # it is a regular member
                yield Member(name, extension, stream.read(), -1 if member.issparse() else member.offset_data)
        # tarfile treats a broken header, or a truncation between two members, as the end. The true end is a block of zeros.
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"neither a header nor the end mark at byte {tar.offset}")
        # More zeros come from an interrupted download into a file of the full length. Other bytes may be a second tar.
        rest = tar.fileobj.read(MAX_TAIL_BYTES + 1)
        if len(rest) > MAX_TAIL_BYTES or rest.strip(b"\0"):
            raise tarfile.ReadError(f"the end mark at byte {tar.offset} is not at the end")


def _escape(name: str) -> str:
    """A name with the bytes that are no UTF-8 written out."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


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


def _map(file: Any) -> memoryview | None:
    """The whole of a local file, mapped into memory; None for a file on S3."""
    is_file = isinstance(file, io.BufferedReader)
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if is_file else None


def _order_pictures(parts: Iterable[str]) -> list[str]:
    """The extensions of pictures: of several, one that img2dataset writes is the sample's, then the first in the tar."""
    return sorted((name for name in parts if name in IMAGES), key=lambda name: name not in WRITTEN)


def _row(sample: Sample, options: SourceOptions, tar: str) -> Row:
    key, parts, offsets, fault = sample
    row: Row = {"uid": key, "image": None, "caption": None, "source": f"{tar}/{key}"}
    images = _order_pictures(parts)
    if images:
        row |= {"image": parts[images[0]], "source": f"{tar}/{key}.{images[0]}", "offset": offsets[images[0]]}
    if fault:
        row["reject"] = fault
        return row
    if None in parts.values():
        row["reject"] = "member over its size limit"
        return row
    try:
        record: Any = json.loads(bytes(parts.get("json") or b"{}"))
        if not isinstance(record, dict):
            raise TypeError(f"a JSON object is needed, not {type(record).__name__}")
        text = bytes(parts.get("txt") or b"").decode()
        row["uid"] = str(record.get("uid") or key)
        text_file = text.splitlines() if options.caption_lines else text
        named = options.columns.caption
        usual = record.get("captions") or record.get("caption") or text_file
        row["caption"] = _parse_caption(text_file if named == "txt" else (record.get(named) or "") if named else usual)
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
