"""Members of a tar to samples, by their names: KEY.jpg, KEY.txt and KEY.json, one after another.

The key ends before the last dot where the extension is known (`photo.v2.jpg` is of `photo.v2`); webdataset itself ends keys at
the first dot, and so loses such members. Members of other extensions are part of the sample whose key their name continues. No
member vanishes: what belongs to no sample is a sample of its own, with a fault.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import NamedTuple

# What `nev.data.decode` opens, by the names of its files.
IMAGES = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "tif", "tiff", "avif"),
    *("jp2", "j2k", "ppm", "pgm", "pbm", "pnm"),
)

HELD = 16  # samples, or names of unknown extensions, that wait for the key that they may belong to


class Member(NamedTuple):
    """A regular member of a tar.

    name: of the member, without its extension where that is known.
    extension: in lower case; empty where it is not known.
    content: None above the size limit, and where the extension is not known.
    offset: where the content begins in the tar, in bytes.
    """

    name: str
    extension: str
    content: bytes | memoryview | None
    offset: int = 0


class Sample(NamedTuple):
    """The members of one key.

    parts: content by extension. fault: why the sample cannot be used, where its members' names tell.
    offsets: where the content begins in the tar, by extension.
    """

    key: str
    parts: dict[str, bytes | memoryview | None]
    offsets: dict[str, int]
    fault: str = ""


def split_name(name: str, known: Iterable[str]) -> tuple[str, str]:
    """The name without its extension, and the extension, in lower case; the whole name and "" where it is not known.

    known: the longest first: of `seg.png` and `png` the longer one counts.
    """
    for extension in known:
        stem = name[: -len(extension) - 1]
        if name.lower().endswith(f".{extension}") and stem and not stem.endswith("/"):
            return stem, extension
    return name, ""


def group_members(members: Iterable[Member]) -> Iterator[Sample]:
    """Consecutive members of one key as a sample. An extension that comes again begins a new one."""
    last, others = "", list[str]()
    parts, offsets = dict[str, bytes | memoryview | None](), dict[str, int]()
    for name, extension, content, offset in members:
        if not extension:
            if not (last and _continues(name, last)):
                others.append(name)
            if len(others) > HELD:
                yield from _end(last, parts, offsets)
                last, parts, offsets = "", {}, {}
                yield from _count_others(others[:-1])
                others = others[-1:]
            continue
        foreign = [other for other in others if not _continues(other, name)]
        if last and (foreign or name != last or extension in parts):
            yield from _end(last, parts, offsets)
            parts, offsets = {}, {}
        yield from _count_others(foreign)
        last, others = name, []
        parts[extension], offsets[extension] = content, offset
    yield from _end(last, parts, offsets)
    yield from _count_others(others)


def _end(key: str, parts: dict[str, bytes | memoryview | None], offsets: dict[str, int]) -> Iterator[Sample]:
    if key:
        yield Sample(key, parts, offsets)


def _count_others(names: list[str]) -> Iterator[Sample]:
    """Members of extensions that are not known and that belong to no sample: those of one key are a sample with a fault."""
    faults: dict[str, str] = {}
    for name in names:
        folder, slash, base = name.rpartition("/")
        stem, dot, suffix = base.rpartition(".")
        faults[folder + slash + (stem or base)] = f"not read: .{suffix.lower()}" if dot else "not read"
    for key, fault in faults.items():
        yield Sample(key, {}, {}, fault)


def _continues(name: str, key: str) -> bool:
    return name.startswith(f"{key}.")


def find_faults(samples: Iterable[Sample], captioned: bool) -> Iterator[Sample]:
    """The samples, with the faults that their neighbours show.

    A picture KEY.left.png beside KEY.txt may be a second picture of KEY, or one of its own. And where pictures and texts are not
    next to each other, neither is of use. captioned: a picture needs a caption.
    """
    pictures, texts = set[str](), set[str]()  # keys of samples that lack the other
    for _, run in groupby(samples, lambda sample: _shorten(sample.key)):
        while held := list(islice(run, HELD)):  # with their content, so not without end
            keys = {sample.key for sample in held if sample.parts and not _is_alone(sample)}
            for sample in held:
                yield _check(sample, keys, pictures, texts, captioned)


def _check(sample: Sample, keys: set[str], pictures: set[str], texts: set[str], captioned: bool) -> Sample:
    """The sample with its fault. keys: of the samples beside it that have more than pictures."""
    key = sample.key
    if sample.fault or not sample.parts:
        return sample
    if _is_alone(sample):
        pictures.add(key)
        if key.rpartition(".")[0] in keys:
            return sample._replace(fault="ambiguous key: its part before the last dot is the key beside it")
        if captioned and key in texts:
            return sample._replace(fault="apart from its text: sort the tar by name")
    elif not any(extension in IMAGES for extension in sample.parts):
        texts.add(key)
        if key in pictures:
            return sample._replace(fault="apart from its picture: sort the tar by name")
    return sample


def _is_alone(sample: Sample) -> bool:
    """Whether a sample has pictures and nothing else."""
    return all(extension in IMAGES for extension in sample.parts)


def _shorten(name: str) -> str:
    """The name up to the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]
