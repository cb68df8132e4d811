"""What all readers of foreign formats share: the options, the search for input files, and the division into parts."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import field_validator

from nev.common.location import S3, check_location
from nev.config.base import ConfigError, Positive, Section
from nev.config.data import Columns, Limits
from nev.data.index import LINKED_FOLDER
from nev.data.rows import Row
from nev.storage.files import filesystem, remedy, storage_errors
from nev.storage.reading import read_errors_as_data_errors

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


class File(NamedTuple):
    """An input file.

    location: absolute path or s3:// URL.
    size: in bytes.
    stamp: modification time in ns, or ETag: another value if the file changes.
    """

    location: str
    size: int
    stamp: str


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


def find_files(
    inputs: Iterable[str | Path], suffixes: tuple[str, ...], unread: Counter[str] | None = None, otherwise: str = ""
) -> list[File]:
    """The files of the inputs, sorted. An input is a file, a folder (searched at all depths) or a glob pattern, local or on S3.

    suffixes: of the files of a folder, in lower case. unread: the other files of a folder are counted here, by suffix.
    otherwise: what else may be read, for the message about a folder without such files.

    In a folder, files are left out whose name, or a folder of theirs, begins with '_' or '.'. Raises ConfigError for an input
    without files, and DataError where S3 cannot be listed.
    """
    files: dict[str, File] = {}
    for pattern in map(str, inputs):
        matches, folder = _remote(pattern) if check_location(pattern).startswith(S3) else _local(pattern)
        if folder:
            matching = [file for file in matches if file.location.lower().endswith(suffixes)]
            if unread is not None:
                unread.update(name_suffix(file.location) for file in set(matches) - set(matching))
            if not matching:
                names = {Path(file.location).suffix or Path(file.location).name for file in matches}
                suffixes_found = ", ".join(sorted(names)) or "nothing"
                wanted = f"{' or '.join(filter(None, suffixes))} file".strip()
                raise ConfigError(f"{pattern}: no {wanted} in this folder (it holds: {suffixes_found}){otherwise}")
            matches = matching
        if not matches:
            raise ConfigError(f"{pattern}: no such file or folder, and as a pattern it matches nothing")
        files |= {file.location: file for file in matches}
    if not files:
        raise ConfigError("a source needs at least one input: a file, a folder or a pattern")
    return sorted(files.values(), key=lambda file: file.location.split("/"))


def name_suffix(location: str) -> str:
    """The suffix of a file, in lower case, that of a compressed tar as a whole; "no suffix" where there is none."""
    path = PurePosixPath(location)
    inner = PurePosixPath(path.stem).suffix.lower()
    return (inner if inner == ".tar" else "") + path.suffix.lower() or "no suffix"


def refuse_inside(output: str, inputs: Iterable[str | Path]) -> None:
    """Raise ConfigError for an output inside a folder of the input, since the next prepare would read it."""
    resolved = _resolve(output)
    for pattern in map(str, inputs):
        if f"{resolved}/".startswith(f"{_resolve(pattern)}/"):
            raise ConfigError(
                f"{output}: lies in the input {pattern}, so the next prepare would read the output of this one. Use a folder "
                "beside it, or name the input's files by a pattern."
            )


def _resolve(location: str) -> str:
    """The location as an absolute path without links, or the URL."""
    if location.startswith(S3):
        return location.rstrip("/")
    return str(Path(location).expanduser().resolve())


def _local(pattern: str) -> tuple[list[File], bool]:
    """The files of an input, and whether it is a folder."""
    path = Path(pattern)
    if path.is_file():
        return [_stat_file(path)], False
    if path.is_dir():
        return [_stat_file(file) for file in list_folder(path) if file.is_file()], True
    matches = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    return [_stat_file(file) for file in matches if file.is_file()], False


def list_folder(folder: Path) -> list[Path]:
    """The files and folders in a local folder, at any depth, sorted, but for names that begin with '_' or '.'.

    Raises ConfigError for a link to a folder, whose files would be left out or read several times.
    """
    walk = os.walk(folder, onerror=_refuse)
    paths = sorted(Path(parent, name) for parent, folders, files in walk for name in (*folders, *files))
    entries = [path for path in paths if not is_hidden(path, folder)]
    if linked := next((path for path in entries if path.is_symlink() and path.is_dir()), None):
        raise ConfigError(f"{linked}: {LINKED_FOLDER}")
    return entries


def _refuse(error: OSError) -> None:
    raise ConfigError(
        f"{error.filename}: this folder cannot be listed ({error.strerror}). Allow it, or name the other folders."
    )


def _remote(pattern: str) -> tuple[list[File], bool]:
    fs, path = filesystem(pattern.rstrip("/"))
    with read_errors_as_data_errors(pattern, damaged=""):
        if any(sign in path for sign in "*?["):
            return [
                _entry_file(entry) for entry in fs.glob(path, detail=True).values() if entry["type"] == "file"
            ], False
        if not fs.exists(path):
            return [], False
        if fs.isfile(path):
            return [_entry_file(fs.info(path))], False
        entries = fs.find(path, detail=True)
    return [_entry_file(entry) for name, entry in entries.items() if not is_hidden(Path(name), Path(path))], True


def _stat_file(path: Path) -> File:
    stat = path.stat()
    # Path.resolve would follow links: the name of a file is its path as it was listed.
    return File(os.path.abspath(path), stat.st_size, str(stat.st_mtime_ns))  # noqa: PTH100


def _entry_file(entry: dict[str, Any]) -> File:
    return File(f"{S3}{entry['name']}", entry["size"], str(entry.get("ETag") or entry.get("LastModified")))


def is_hidden(path: Path, folder: Path) -> bool:
    """Whether the name of `path`, or of a folder between it and `folder`, begins with '_' or '.'."""
    return any(part.startswith(("_", ".")) for part in path.relative_to(folder).parts)


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
