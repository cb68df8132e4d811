"""What all readers of foreign formats share: the options, the search for input files, and the division into parts."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import field_validator

from nev.config.base import ConfigError, Positive, Section
from nev.config.data import Columns, Limits
from nev.data.rows import Row
from nev.data.sources.input_files import File
from nev.storage.files import remedy, storage_errors

FETCH_AGAIN = "Fetch it again, or remove it from the input."


class SourceOptions(Section):
    """How to read a source."""

    columns: Columns = Columns()
    """Column names."""
    label_name: str | None = None
    """Column of the class name."""
    templates: tuple[str, ...] = ()
    """Captions of a labelled set, with '{}' for the class name."""
    captioned: bool = True
    """The source must have captions, as training needs them. false: labels alone are enough, for evaluation."""
    caption_lines: bool = False
    """A tar's KEY.txt has one caption per line, as CLIP_benchmark writes it."""
    score: str | None = None
    """Column (or JSON key) with the similarity of picture and caption."""
    extra: tuple[str, ...] = ()
    """Columns, JSON keys or tar members that are copied to `extra` of a row."""
    metadata: tuple[str, ...] = ()
    """DataComp's metadata: parquet files, or their folder."""
    tar_in_uid: bool = False
    """The name of its tar is part of a row's uid."""
    limits: Limits = Limits()
    """Limits of an encoded image."""
    part_bytes: Positive = 512 * 2**20
    """Size of a part, roughly. A part is a group of files that one task reads."""

    @field_validator("templates")
    @classmethod
    def _has_slot(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"a template needs exactly one '{{}}' for the class name: {template!r}")
        return templates


class Part(NamedTuple):
    """A part of the input, which one task reads.

    stamp: unique among the parts; another value if the files of the part change.
    content: argument of `Source.read`, such as a list of locations.
    """

    stamp: str
    content: Any


class Source(NamedTuple):
    """A source of rows, in parts that any process can read by itself.

    parts: can be pickled.
    read: yields the rows of a part, in order, given the part's content. Can be pickled.
    nbytes: rough size of the input.
    spec: the options on which the rows of all parts depend, as JSON. None for rows that can be read only once.
    unread: files in the folders of the input that the source does not read, by suffix.
    """

    parts: Sequence[Part]
    read: Callable[[Any], Iterable[Row]]
    nbytes: int
    spec: dict[str, Any] | None
    unread: Mapping[str, int] = MappingProxyType({})


def iterate_rows(source: Source) -> Iterator[Row]:
    """All rows of a source, in the order of its parts."""
    return chain.from_iterable(source.read(part.content) for part in source.parts)


def make_source(rows: Iterable[Row], nbytes: int = 0, spec: dict[str, Any] | None = None) -> Source:
    """Make a source of `rows`: one part, which is read in this process."""
    return Source([Part("rows", rows)], iter, nbytes, spec)


def take_first(source: Source, limit: int) -> Source:
    """A source of the first `limit` rows of another source, in one part."""
    part = Part(hash_content([part.stamp for part in source.parts]), [part.content for part in source.parts])
    return source._replace(parts=[part], read=partial(_first_rows, read=source.read, limit=limit))


def _first_rows(parts: Sequence[Any], read: Callable[[Any], Iterable[Row]], limit: int) -> Iterator[Row]:
    return islice(chain.from_iterable(map(read, parts)), limit)


def fill_templates(templates: tuple[str, ...], name: str) -> list[str]:
    """The captions of a class: each template with the class name, in which underscores become spaces."""
    return [template.replace("{}", name.replace("_", " ")) for template in templates]


def describe_options(kind: str, options: SourceOptions, **more: str) -> dict[str, Any]:
    """The `spec` of a source: the kind, the options, and `more`."""
    return {"source": kind, **more, **options.model_dump(mode="json")}


def hash_content(content: Any) -> str:
    """A short hash of a JSON value."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=12).hexdigest()


def group_files(files: Iterable[File], part_bytes: int) -> list[Part]:
    """Group the files, in order, into parts of at most `part_bytes`. A larger file is a part of its own."""
    groups: list[list[File]] = []
    group_bytes = 0
    for file in files:
        if not groups or group_bytes + file.size > part_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1].append(file)
        group_bytes += file.size
    return [Part(hash_content(group), [file.location for file in group]) for group in groups]


def shared_folder(folders: Iterable[str]) -> str:
    """The deepest common folder of `folders`, which are absolute paths or URLs."""
    shared: list[str] = []
    for names in zip(*(folder.split("/") for folder in folders), strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return "/".join(shared)


def relative_name(folder: str, location: str) -> str:
    """The path of `location` relative to `folder`."""
    return location.removeprefix(folder).lstrip("/")


def parent_folder(location: str) -> str:
    """The folder of a file."""
    return location.rpartition("/")[0]


@contextmanager
def input_file(location: str, expected: str) -> Iterator[None]:
    """Turn errors of a damaged or unreachable file into a ConfigError: '<location>: not <expected> (...)'."""
    try:
        yield
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ConfigError(f"{location}: not {expected} ({error}). {FETCH_AGAIN}") from error
    except storage_errors() as error:
        advice = remedy(error, FETCH_AGAIN)
        raise ConfigError(f"{location}: not {expected} ({error}). {advice}") from error
