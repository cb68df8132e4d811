"""The files that inputs name: files, folders, patterns, on this machine or on S3."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from nev.common.location import BRACES, S3, check_location, expand_braces
from nev.config.base import ConfigError
from nev.data.index import LINKED_FOLDER
from nev.storage.files import filesystem
from nev.storage.reading import read_errors_as_data_errors


class File(NamedTuple):
    """An input file.

    location: absolute path or s3:// URL.
    size: in bytes.
    stamp: modification time in ns, or ETag: another value if the file changes.
    """

    location: str
    size: int
    stamp: str


def find_files(
    inputs: Iterable[str | Path], suffixes: tuple[str, ...], unread: Counter[str] | None = None, otherwise: str = ""
) -> list[File]:
    """The files of the inputs, sorted. An input is a file, a folder (searched at all depths) or a pattern, local or on S3.

    A pattern is `*.tar`, or names files as `{00000..00099}.tar` or folders as `{a,b}`, which are then all there, or both.

    suffixes: of the files of a folder, in lower case. unread: the other files of a folder are counted here, by suffix.
    otherwise: what else may be read, for the message about a folder without such files.

    In a folder, files are left out whose name, or a folder of theirs, begins with '_' or '.'. Raises ConfigError for an input
    without files, and DataError where S3 cannot be listed.
    """
    files: dict[str, File] = {}
    for pattern in map(str, inputs):
        matches, folder = _find(pattern)
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


def _find(pattern: str) -> tuple[list[File], bool]:
    """The files of an input, and whether it is a folder."""
    look = _remote if check_location(pattern).startswith(S3) else _local
    names = [pattern] if Path(pattern).exists() else expand_braces(pattern)
    if len(names) == 1:
        return look(names[0])
    if any(sign in name or not PurePosixPath(name).suffix for name in names for sign in "*?["):  # patterns, or folders
        found = {name: look(name) for name in names}
        if missing := [name for name in names if not found[name][0]]:
            raise ConfigError(
                f"{pattern}: {missing[0]} matches nothing ({len(missing):,} of {len(names):,} such names)"
            )
        return [file for files, _ in found.values() for file in files], any(folder for _, folder in found.values())
    wider = pattern
    while BRACES.search(wider):
        wider = BRACES.sub("*", wider)
    listed = {file.location: file for file in look(wider)[0]}  # one listing, and not a request for each name
    wanted = names if look is _remote else [os.path.abspath(name) for name in names]  # noqa: PTH100
    if missing := [name for name in wanted if name not in listed]:
        raise ConfigError(f"{pattern}: {len(missing):,} of {len(names):,} files are not there ({missing[0]})")
    return [listed[name] for name in wanted], False


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
