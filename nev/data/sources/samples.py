"""Members of a tar to samples, by their names: KEY.jpg, KEY.txt and KEY.json, one after another.

The key ends before the last dot where the extension is known (`photo.v2.jpg` is of `photo.v2`); webdataset itself ends keys at
the first dot, and so loses such members. Members of other extensions are part of the sample whose key their name continues. No
member vanishes: what belongs to no sample is a sample of its own, with a fault.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

# What `nev.data.decode` opens, by the names of its files.
IMAGES = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "tif", "tiff", "avif"),
    *("jp2", "j2k", "ppm", "pgm", "pbm", "pnm"),
)


class Member(NamedTuple):
    """A regular member of a tar.

    name: of the member, without its extension where that is known.
    extension: in lower case; empty where it is not known.
    content: None above the size limit, and where the extension is not known.
    """

    name: str
    extension: str
    content: bytes | None


class Sample(NamedTuple):
    """The members of one key.

    parts: content by extension. fault: why the sample cannot be used, where its members' names tell.
    """

    key: str
    parts: dict[str, bytes | None]
    fault: str = ""


def split_name(name: str, known: Iterable[str]) -> tuple[str, str]:
    """The name without its extension, and the extension, in lower case; the whole name and "" where it is not known."""
    for extension in known:
        stem = name[: -len(extension) - 1]
        if name.lower().endswith(f".{extension}") and stem and not stem.endswith("/"):
            return stem, extension
    return name, ""


def group_members(members: Iterable[Member]) -> Iterator[Sample]:
    """Consecutive members of one key as a sample. An extension that comes again begins a new one."""
    last, parts, other = "", dict[str, bytes | None](), ""
    for name, extension, content in members:
        if not extension:
            if last and _continues(name, last):
                continue
            if other and _shorten(other) != _shorten(name):
                yield from _end(last, parts, other)
                last, parts = "", {}
            other = name
            continue
        if other and not _continues(other, name):
            yield from _end(last, parts, other)
            last, parts = "", {}
        elif last and (name != last or extension in parts):
            yield Sample(last, parts)
            parts = {}
        last, other = name, ""
        parts[extension] = content
    yield from _end(last, parts, other)


def _end(last: str, parts: dict[str, bytes | None], other: str) -> Iterator[Sample]:
    """The sample that ends, and the members of extensions that are not known, which belong to none."""
    if last:
        yield Sample(last, parts)
    if other:
        yield Sample(_shorten(other), {}, f"not read: .{other.rpartition('.')[2]}" if "." in other else "not read")


def _continues(name: str, key: str) -> bool:
    return name.startswith(f"{key}.")


def _shorten(name: str) -> str:
    """The name up to the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def find_faults(samples: Iterable[Sample], captioned: bool) -> Iterator[Sample]:
    """The samples, with the faults that their neighbours show.

    A picture KEY.left.png beside KEY.txt may be a second picture of KEY, or one of its own. And where pictures and texts are not
    next to each other, neither is of use. captioned: a picture needs a caption.
    """
    pictures, texts = set[str](), set[str]()  # keys of samples that lack the other
    before = ""
    waiting: Sample | None = None
    for sample in samples:
        if waiting:
            yield _check(waiting, (before, sample.key), pictures, texts, captioned)
            before = waiting.key
        waiting = sample
    if waiting:
        yield _check(waiting, (before, ""), pictures, texts, captioned)


def _check(sample: Sample, beside: tuple[str, str], pictures: set[str], texts: set[str], captioned: bool) -> Sample:
    key, has_picture = sample.key, any(extension in IMAGES for extension in sample.parts)
    alone = all(extension in IMAGES for extension in sample.parts)
    if sample.fault or not sample.parts:
        return sample
    if has_picture and alone:
        pictures.add(key)
        if key.rpartition(".")[0] in beside and key.rpartition(".")[0]:
            return sample._replace(fault="ambiguous key: its part before the last dot is the key beside it")
        if captioned and key in texts:
            return sample._replace(fault="apart from its text: sort the tar by name")
    elif not has_picture:
        texts.add(key)
        if key in pictures:
            return sample._replace(fault="apart from its picture: sort the tar by name")
    return sample
