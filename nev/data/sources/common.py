"""What every reader of a foreign format shares: its settings, how its input is found, and how it is cut to parts."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import field_validator

from nev.config.base import ConfigError, Positive, Section
from nev.config.data import Columns, Limits
from nev.data.index import LINKED_FOLDER
from nev.data.rows import Row
from nev.storage.files import filesystem, remedy, storage_errors
from nev.storage.reading import read_errors_as_data_errors

S3 = "s3://"
FETCH_AGAIN = "Fetch it again, or take it out of the input."


class SourceOptions(Section):
    """How to read a source. `templates` make the captions of a labelled set: '{}' stands for the class name.

    captioned: whether rows must be able to have captions, as training wants; evaluation may need labels alone.
    caption_lines: a tar's KEY.txt has a caption a line, as CLIP_benchmark writes them. score: the
    column with the similarity of picture and caption. extra: columns, keys of the JSON or tar members that come along as they
    are, under `extra` of a row. metadata: DataComp's parquet files or their folder.
    tar_in_uid: the name of its tar is a part of a row's uid. part_bytes: files are grouped to parts of about this size, a
    part is one task.
    """

    columns: Columns = Columns()
    label_name: str | None = None
    templates: tuple[str, ...] = ()
    captioned: bool = True
    caption_lines: bool = False
    score: str | None = None
    extra: tuple[str, ...] = ()
    metadata: tuple[str, ...] = ()
    tar_in_uid: bool = False
    limits: Limits = Limits()
    part_bytes: Positive = 512 * 2**20

    @field_validator("templates")
    @classmethod
    def _has_slot(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"a template needs exactly one '{{}}' for the class name: {template!r}")
        return templates


class File(NamedTuple):
    """An input file. location: absolute path or s3:// URL. stamp: changes when the file does (mtime in ns, ETag)."""

    location: str
    size: int
    stamp: str


class Part(NamedTuple):
    """What is read apart from the rest. stamp: changes when what is read does, and differs from part to part."""

    stamp: str
    content: Any


class Source(NamedTuple):
    """Rows to come, cut to parts that are read apart from each other, in any process.

    read: the rows of one part, from its content, in order; it and the parts can be pickled. nbytes: of the input, roughly.
    facts: what the rows of any part depend on beside what its stamp stands for, as JSON; None for rows that can be read once
    only.
    """

    parts: Sequence[Part]
    read: Callable[[Any], Iterable[Row]]
    nbytes: int
    spec: dict[str, Any] | None


def iterate_rows(source: Source) -> Iterator[Row]:
    """All rows of a source, in the order of its parts."""
    return chain.from_iterable(source.read(part.content) for part in source.parts)


def make_source(rows: Iterable[Row], nbytes: int = 0, spec: dict[str, Any] | None = None) -> Source:
    """The source of rows at hand: one part, read in this process."""
    return Source([Part("rows", rows)], iter, nbytes, spec)


def fill_templates(templates: tuple[str, ...], name: str) -> list[str]:
    """The captions of a class: each template about its name, whose underscores are read as spaces."""
    return [template.replace("{}", name.replace("_", " ")) for template in templates]


def describe_options(kind: str, options: SourceOptions, **more: str) -> dict[str, Any]:
    """What the rows of every part depend on, of whatever files it has."""
    return {"source": kind, **more, **options.model_dump(mode="json")}


def hash_content(content: Any) -> str:
    """A short digest of JSON."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=12).hexdigest()


def group_files(files: Iterable[File], part_bytes: int) -> list[Part]:
    """The locations of `files`, in order, in groups of `part_bytes` at most; a larger file is a group of its own."""
    groups: list[list[File]] = []
    held = 0
    for file in files:
        if not groups or held + file.size > part_bytes:
            groups.append([])
            held = 0
        groups[-1].append(file)
        held += file.size
    return [Part(hash_content(group), [file.location for file in group]) for group in groups]


def find_files(inputs: Iterable[str | Path], suffixes: tuple[str, ...]) -> list[File]:
    """The files that `inputs` name, sorted: each is a file, a folder (searched whole) or a glob pattern, here or on s3://.

    In a folder, files whose name or parent begins with '_' or '.' are left out. Raises ConfigError where an input gives
    nothing, input_file what was found instead, and DataError where S3 can't be listed.
    """
    files: dict[str, File] = {}
    for given in map(str, inputs):
        found, folder = _remote(given) if given.startswith(S3) else _local(given)
        if folder:
            fitting = [file for file in found if file.location.endswith(suffixes)]
            if not fitting:
                names = {Path(file.location).suffix or Path(file.location).name for file in found}
                others = ", ".join(sorted(names)) or "nothing"
                raise ConfigError(f"{given}: no {' or '.join(suffixes)} file in this folder (it holds: {others})")
            found = fitting
        if not found:
            raise ConfigError(f"{given}: no such file or folder, and as a pattern it matches nothing")
        files |= {file.location: file for file in found}
    if not files:
        raise ConfigError("a source needs at least one input: a file, a folder or a pattern")
    return sorted(files.values(), key=lambda file: file.location.split("/"))


def refuse_inside(output: str, inputs: Iterable[str | Path]) -> None:
    """Raise ConfigError for an output in a folder of the input: what is written there would be input the next time."""
    at = _whole(output)
    for given in map(str, inputs):
        if f"{at}/".startswith(f"{_whole(given)}/"):
            raise ConfigError(
                f"{output}: lies in the input {given}, so the next prepare would read what this one writes. Use a folder "
                "beside it, or name the input's files by a pattern."
            )


def _whole(location: str) -> str:
    """The same location, absolute, and without links."""
    if location.startswith(S3):
        return location.rstrip("/")
    return str(Path(location).expanduser().resolve())


def _local(given: str) -> tuple[list[File], bool]:
    """The files of an input, and whether it is a folder."""
    path = Path(given)
    if path.is_file():
        return [_stamped(path)], False
    if path.is_dir():
        return [_stamped(file) for file in list_folder(path) if file.is_file()], True
    matches = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    return [_stamped(file) for file in matches if file.is_file()], False


def list_folder(folder: Path) -> list[Path]:
    """What lies in a folder of this machine at any depth, sorted, but for names with '_' or '.' in front.

    Raises ConfigError for a link to a folder: what is behind it would be left out, or be read again and again.
    """
    names = [Path(at, name) for at, folders, files in os.walk(folder, onerror=_refuse) for name in (*folders, *files)]
    found = [path for path in sorted(names) if not hidden(path, folder)]
    if linked := next((path for path in found if path.is_symlink() and path.is_dir()), None):
        raise ConfigError(f"{linked}: {LINKED_FOLDER}")
    return found


def _refuse(error: OSError) -> None:
    raise ConfigError(
        f"{error.filename}: this folder can't be listed ({error.strerror}). Allow it, or name the others."
    )


def _remote(given: str) -> tuple[list[File], bool]:
    fs, path = filesystem(given.rstrip("/"))
    with read_errors_as_data_errors(given, damaged=""):
        if any(sign in path for sign in "*?["):
            return [_listed(entry) for entry in fs.glob(path, detail=True).values() if entry["type"] == "file"], False
        if not fs.exists(path):
            return [], False
        if fs.isfile(path):
            return [_listed(fs.info(path))], False
        entries = fs.find(path, detail=True)
    return [_listed(entry) for name, entry in entries.items() if not hidden(Path(name), Path(path))], True


def _stamped(path: Path) -> File:
    found = path.stat()
    # Not Path.resolve: a file's name is where it was found, whatever the links on the way.
    return File(os.path.abspath(path), found.st_size, str(found.st_mtime_ns))  # noqa: PTH100


def _listed(entry: dict[str, Any]) -> File:
    return File(f"{S3}{entry['name']}", entry["size"], str(entry.get("ETag") or entry.get("LastModified")))


def hidden(path: Path, folder: Path) -> bool:
    """Whether the name of `path`, or of a folder between it and `folder`, begins with '_' or '.'."""
    return any(part.startswith(("_", ".")) for part in path.relative_to(folder).parts)


def shared_folder(folders: Iterable[str]) -> str:
    """The deepest folder that holds all of `folders`, which are absolute paths or URLs."""
    shared: list[str] = []
    for names in zip(*(folder.split("/") for folder in folders), strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return "/".join(shared)


def relative_name(folder: str, location: str) -> str:
    """The name of `location` from `folder`, which holds it."""
    return location.removeprefix(folder).lstrip("/")


def parent_folder(location: str) -> str:
    """The folder of a file."""
    return location.rpartition("/")[0]


@contextmanager
def input_file(location: str, wanted: str) -> Iterator[None]:
    """Turn what a damaged or unreachable file raises into a ConfigError: '<location>: not <wanted> (...)'."""
    try:
        yield
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ConfigError(f"{location}: not {wanted} ({error}). {FETCH_AGAIN}") from error
    except storage_errors() as error:
        advice = remedy(error, FETCH_AGAIN)
        raise ConfigError(f"{location}: not {wanted} ({error}). {advice}") from error
