"""Read a folder of pictures: with a table of captions beside them, or with one sub-folder a class.

A file is read only if it lies in the folder: a path or a link that leads out of it is rejected.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from nev.config.base import ConfigError
from nev.config.data import Limits
from nev.data.rows import Row, parse_captions
from nev.data.sources.common import (
    S3,
    Part,
    Source,
    SourceOptions,
    describe_options,
    fill_templates,
    find_files,
    hash_content,
    list_folder,
    parent_folder,
    relative_name,
    shared_folder,
)

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TABLES = (".csv", ".tsv", ".jsonl")
FILE_COLUMNS = ("file_name", "filename", "file", "filepath", "image", "path")
CAPTION_COLUMNS = ("caption", "text", "title")
PART_PICTURES = 4096
PICTURE_BYTES = 100_000  # a guess, where asking each file for its size would take long

Captions = dict[str, list[str]]


class Picture(NamedTuple):
    """A file to read: the row that waits for its bytes, the folder that it must lie in, and its path."""

    row: Row
    folder: str
    path: str


def captions(inputs: Iterable[str | Path], options: SourceOptions) -> Source:
    """One row a file that a table names, in the order of the tables; its lines, in whichever table, are its captions.

    `inputs` are the tables (.csv, .tsv, .jsonl, their first line or their keys naming the columns), or folders with
    tables in them; paths in a table start at its own folder. uid: the path from the folder that all tables share. The
    captions of all tables are held in memory. Raises ConfigError for a table that is not readable or lacks a column.
    """
    tables = find_files(_at_home(inputs), TABLES)
    root = shared_folder(parent_folder(table.location) for table in tables)
    found: dict[str, Picture] = {}
    for table in tables:
        folder = parent_folder(table.location)
        for name, said in _captions(Path(table.location), options).items():
            path = str(Path(folder, name))
            if path in found:
                found[path].row["caption"] = [*parse_captions(found[path].row["caption"]), *said]
                continue
            row: Row = {"uid": str(PurePosixPath(relative_name(root, folder)) / name), "image": None, "caption": said}
            if Path(name).suffix.lower() not in IMAGES:
                row["reject"] = "not an image file"
            found[path] = Picture(row, folder, path)
    pictures = list(found.values())
    nbytes = len(pictures) * PICTURE_BYTES
    return Source(
        _parts(pictures, _stamps(found)),
        partial(read, limits=options.limits),
        nbytes,
        describe_options("captions", options),
    )


def classes(inputs: Iterable[str | Path], options: SourceOptions) -> Source:
    """One row an image file, sorted; the folder at the top of `inputs` is its class, and templates its captions.

    label: the position of the class among the sorted names of all `inputs`. uid: the path from the folder that they
    share. Names that begin with '_' or '.' are left out. Raises ConfigError without templates where captions are needed, for an
    input that is not a folder, without classes, or with a class without pictures.
    """
    roots = sorted({Path(os.path.abspath(root)): Path(root) for root in _at_home(inputs)}.items())  # noqa: PTH100
    if not roots:
        raise ConfigError("a source needs at least one input: a folder with one sub-folder a class")
    if not options.templates and options.captioned:
        raise ConfigError("a folder of classes has no captions: make them with --template 'a photo of a {}.'")
    found = [(root, file) for root, given in roots for file in _images(root, given)]
    names = sorted({file.relative_to(root).parts[0] for root, file in found if file.parent != root})
    labels = {name: label for label, name in enumerate(names)}
    said = {name: fill_templates(options.templates, name) for name in names}
    shared = shared_folder(str(root) for root, _ in roots)
    pictures = []
    for root, file in found:
        row: Row = {"uid": relative_name(shared, str(file)), "image": None, "caption": None}
        if file.parent == root:
            row["reject"] = "not in the folder of a class"
        else:
            name = file.relative_to(root).parts[0]
            row |= {"caption": said[name], "label": labels[name], "label_name": name}
        pictures.append(Picture(row, str(root), str(file)))
    stamps = _stamps(str(file) for _, file in found)
    nbytes = sum(size for size, _ in stamps.values())
    return Source(
        _parts(pictures, stamps),
        partial(read, limits=options.limits),
        nbytes,
        describe_options("classes", options),
    )


def read(pictures: Iterable[Picture], limits: Limits) -> Iterator[Row]:
    """Yield the rows of `pictures`, the bytes of each file read if it lies in its folder and is no larger than the limit."""
    for picture in pictures:
        row = picture.row.copy()
        if "reject" not in row:
            _fill_in(row, picture, limits)
        yield row


def _fill_in(row: Row, picture: Picture, limits: Limits) -> None:
    try:
        real = Path(picture.path).resolve()
        if not real.is_relative_to(Path(picture.folder).resolve()):
            row["reject"] = "path leads out of the folder"
        elif not real.is_file():
            row["reject"] = "no such file"
        elif real.stat().st_size > limits.max_bytes:
            row["reject"] = f"image over {limits.max_bytes} bytes"
        else:
            row["image"] = real.read_bytes()
    except (OSError, RuntimeError, ValueError):  # no permission; a link to itself; a zero byte in the name
        row["reject"] = "file not readable"


def _stamps(paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(bytes, mtime in ns) of those that are there; of a link itself, since what it leads to may be missing."""
    found = {}
    for path in paths:
        with suppress(OSError, ValueError):  # ValueError: a zero byte in the name
            entry = Path(path).lstat()
            found[path] = entry.st_size, entry.st_mtime_ns
    return found


def _parts(pictures: list[Picture], stamps: dict[str, tuple[int, int]] | None = None) -> list[Part]:
    """`pictures` in parts, each known by its rows and, where they are given, (bytes, mtime in ns) of its files by path."""
    parts = [pictures[at : at + PART_PICTURES] for at in range(0, len(pictures), PART_PICTURES)]
    return [
        Part(hash_content([[*picture, (stamps or {}).get(picture.path)] for picture in part]), part) for part in parts
    ]


def _at_home(inputs: Iterable[str | Path]) -> list[str]:
    given = [str(one) for one in inputs]
    for one in given:
        if one.startswith(S3):
            raise ConfigError(
                f"{one}: folders of pictures are read from disks alone. Copy it here, or make tars of it."
            )
    return given


def _images(root: Path, given: Path) -> list[Path]:
    if not root.is_dir():
        found = "this is a file" if root.exists() else "no such file or folder"
        raise ConfigError(f"{given}: {found}. A folder with a sub-folder for each class is needed.")
    there = list_folder(root)
    images = [path for path in there if path.suffix.lower() in IMAGES and not path.is_dir()]
    full = {path.relative_to(root).parts[0] for path in images}
    empty = [path.name for path in there if path.parent == root and path.is_dir() and path.name not in full]
    if not any(path.parent != root for path in images):
        others = ", ".join(sorted({path.suffix or path.name for path in there})) or "nothing"
        raise ConfigError(f"{given}: no sub-folder with pictures, one a class (it holds: {others})")
    if empty:
        raise ConfigError(f"{given / empty[0]}: a class without pictures ({', '.join(IMAGES)}). Remove that folder.")
    return images


def _captions(table: Path, options: SourceOptions) -> Captions:
    """file name -> captions, in the order in which the table names them first."""
    captions: Captions = {}
    try:
        with open(table, encoding="utf-8-sig", newline="") as text:
            lines = _json_lines(text, table) if table.suffix == ".jsonl" else _cells(text, table)
            file_column = caption_column = ""
            for number, cells in lines:
                if not file_column:
                    file_column = _column(cells, options.columns.image, FILE_COLUMNS, f"{table}: no column of files")
                    caption_column = _column(
                        cells, options.columns.caption, CAPTION_COLUMNS, f"{table}: no column of captions"
                    )
                name, said = cells.get(file_column), cells.get(caption_column)
                if not name or not isinstance(name, str):
                    raise ConfigError(f"{table}:{number}: no file name in column {file_column!r}")
                listed = said if isinstance(said, list) else [said]
                captions.setdefault(name, []).extend(one for one in listed if isinstance(one, str))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"{table}: not readable as a table in UTF-8 ({error}). In a CSV or TSV a quote inside a caption is written twice, "
            "and the caption in quotes."
        ) from error
    if not captions:
        raise ConfigError(f"{table}: no line names a picture")
    return captions


def _cells(text: Iterable[str], table: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """The lines of a CSV or TSV. What divides cells shows in the first line: open_clip's own .csv has tabs, others semicolons.

    Raises csv.Error for quotes that do not pair: they would swallow lines.
    """
    lines = iter(text)
    head = next(lines, "")
    delimiter = next((sign for sign in "\t,;" if sign in head), ",")
    names = next(csv.reader([head], delimiter=delimiter), [])
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    for cells in reader:
        if len(cells) > len(names):
            raise ConfigError(
                f"{table}:{reader.line_num + 1}: {len(cells)} cells, and {len(names)} in the first line. Put quotes around a "
                "caption that holds the delimiter."
            )
        if cells:
            yield reader.line_num + 1, dict(zip(names, cells, strict=False))


def _json_lines(text: Iterable[str], table: Path) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(text, start=1):
        if line.strip():
            try:
                cells = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{table}:{number}: not JSON ({error})") from error
            if not isinstance(cells, dict):
                raise ConfigError(f"{table}:{number}: a JSON object is needed, not {type(cells).__name__}")
            yield number, cells


def _column(cells: dict[str, object], named: str | None, usual: tuple[str, ...], what: str) -> str:
    wanted = (named,) if named else usual
    for name in wanted:
        if name in cells:
            return name
    raise ConfigError(f"{what} {' or '.join(map(repr, wanted))} (columns: {list(cells)}). Name it: --image, --caption")
