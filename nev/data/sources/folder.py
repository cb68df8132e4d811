"""Reads a folder of pictures: with a table of captions, or with one sub-folder for each class.

A file is read only if it lies in the folder: a path or a link that leads out of the folder is rejected.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from nev.common.location import S3, check_location
from nev.config.base import ConfigError
from nev.config.data import Limits
from nev.data.rows import Row, parse_captions
from nev.data.sources import samples
from nev.data.sources.caption_tables import TABLES, read_captions
from nev.data.sources.common import (
    Part,
    Source,
    SourceOptions,
    describe_options,
    fill_templates,
    hash_content,
    parent_folder,
    relative_name,
    shared_folder,
)
from nev.data.sources.input_files import find_files, list_folder, name_suffix

IMAGES = tuple(f".{name}" for name in samples.IMAGES)
PART_PICTURES = 4096
PICTURE_BYTES = 100_000  # an estimate, since a look at the size of each file would take long


class Picture(NamedTuple):
    """A picture to read.

    row: the row, still without the image.
    folder: folder in which the file must lie.
    path: of the file.
    """

    row: Row
    folder: str
    path: str


def captions(inputs: Iterable[str | Path], options: SourceOptions) -> Source:
    """The source of pictures with tables of captions: one row for each file in the tables, in the order of the tables.

    inputs: the tables (.csv, .tsv or .jsonl; the first line or the keys name the columns), or folders with tables in them.
        Paths in a table are relative to the folder of the table.

    uid: the path of the file, relative to the common folder of all tables.
    caption: of all lines that name the file, in any table.

    The captions of all tables are in memory at once. Raises ConfigError for a table that is not readable or lacks a column.
    """
    unread = Counter[str]()
    tables = find_files(
        _refuse_s3(inputs), TABLES, unread, ". COCO's captions are read where their .json is named itself"
    )
    root = shared_folder(parent_folder(table.location) for table in tables)
    by_path: dict[str, Picture] = {}
    for table in tables:
        folder = parent_folder(table.location)
        for name, sentences in read_captions(Path(table.location), options.columns).items():
            path = str(Path(folder, name))
            if path in by_path:
                by_path[path].row["caption"] = [*parse_captions(by_path[path].row["caption"]), *sentences]
                continue
            uid = str(PurePosixPath(relative_name(root, folder)) / name)
            row: Row = {"uid": uid, "image": None, "caption": sentences, "source": path}
            if Path(name).suffix.lower() not in IMAGES:
                row["reject"] = "not an image file"
            by_path[path] = Picture(row, folder, path)
    pictures = list(by_path.values())
    nbytes = len(pictures) * PICTURE_BYTES
    return Source(
        _parts(pictures, _stamps(by_path)),
        partial(read, limits=options.limits),
        nbytes,
        describe_options("captions", options),
        {name: count for name, count in unread.items() if name not in IMAGES},
    )


def classes(inputs: Iterable[str | Path], options: SourceOptions) -> Source:
    """The source of folders with one sub-folder for each class: one row for each image file, sorted by path.

    uid: the path of the file, relative to the common folder of all inputs.
    label: the position of the class among the sorted class names of all inputs.
    caption: `options.templates` with the class name.

    Names that begin with '_' or '.' are left out. Raises ConfigError for an input that is not a folder or has no classes, for a
    class without pictures, and where captions are needed and there are no templates.
    """
    roots = sorted({Path(os.path.abspath(root)): Path(root) for root in _refuse_s3(inputs)}.items())  # noqa: PTH100
    if not roots:
        raise ConfigError("a source needs at least one input: a folder with one sub-folder for each class")
    if not options.templates and options.captioned:
        raise ConfigError("a folder of classes has no captions: make them with --template 'a photo of a {}.'")
    unread = Counter[str]()
    files = [(root, file) for root, name in roots for file in _list_images(root, name, unread)]
    names = sorted({file.relative_to(root).parts[0] for root, file in files if file.parent != root})
    labels = {name: label for label, name in enumerate(names)}
    sentences = {name: fill_templates(options.templates, name) for name in names}
    shared = shared_folder(str(root) for root, _ in roots)
    pictures = []
    for root, file in files:
        row: Row = {"uid": relative_name(shared, str(file)), "image": None, "caption": None, "source": str(file)}
        if file.parent == root:
            row["reject"] = "not in the folder of a class"
        else:
            name = file.relative_to(root).parts[0]
            row |= {"caption": sentences[name], "label": labels[name], "label_name": name}
        pictures.append(Picture(row, str(root), str(file)))
    stamps = _stamps(str(file) for _, file in files)
    nbytes = sum(size for size, _ in stamps.values())
    return Source(
        _parts(pictures, stamps),
        partial(read, limits=options.limits),
        nbytes,
        describe_options("classes", options),
        unread,
    )


def read(pictures: Iterable[Picture], limits: Limits) -> Iterator[Row]:
    """Yield the rows of `pictures`, with the bytes of each file that lies in its folder and is not above the size limit."""
    for picture in pictures:
        row = picture.row.copy()
        if "reject" not in row:
            fill_in(row, picture.path, picture.folder, limits)
        yield row


def fill_in(row: Row, path: str, folder: str, limits: Limits) -> None:
    """Set the row's image, the bytes of the file at `path`; or the reason why not. A file outside of `folder` is not read."""
    try:
        real = Path(path).resolve()
        if not real.is_relative_to(_resolve(folder)):
            row["reject"] = "path leads out of the folder"
        elif not real.is_file():
            row["reject"] = "no such file"
        elif real.stat().st_size > limits.max_bytes:
            row["reject"] = f"image over {limits.max_bytes} bytes"
        else:
            row["image"] = real.read_bytes()
    except (OSError, RuntimeError, ValueError):  # RuntimeError: a link to itself. ValueError: a zero byte in the name
        row["reject"] = "file not readable"


@functools.lru_cache(maxsize=16)
def _resolve(folder: str) -> Path:
    return Path(folder).resolve()


def _stamps(paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(bytes, mtime in ns) of the existing files, by path. Of a link itself, not of its target, which may be missing."""
    stamps = {}
    for path in paths:
        with suppress(OSError, ValueError):  # ValueError: a zero byte in the name
            entry = Path(path).lstat()
            stamps[path] = entry.st_size, entry.st_mtime_ns
    return stamps


def _parts(pictures: list[Picture], stamps: dict[str, tuple[int, int]] | None = None) -> list[Part]:
    """Divide the pictures into parts. The stamp of a part is a hash of its rows and of the stamps of its files."""
    parts = [pictures[start : start + PART_PICTURES] for start in range(0, len(pictures), PART_PICTURES)]
    return [
        Part(hash_content([[*picture, (stamps or {}).get(picture.path)] for picture in part]), part) for part in parts
    ]


def _refuse_s3(inputs: Iterable[str | Path]) -> list[str]:
    """The inputs as strings. Raises ConfigError for an s3:// URL."""
    names = [str(name) for name in inputs]
    for name in names:
        if check_location(name).startswith(S3):
            raise ConfigError(
                f"{name}: folders of pictures are read from local disks alone. Copy it here, or make tars of it."
            )
    return names


def _list_images(root: Path, name: Path, unread: Counter[str]) -> list[Path]:
    """The image files of a folder of classes. name: the folder as the user wrote it. unread: other files are counted here."""
    if not root.is_dir():
        problem = "this is a file" if root.exists() else "no such file or folder"
        raise ConfigError(f"{name}: {problem}. A folder with a sub-folder for each class is needed.")
    entries = list_folder(root)
    images = [path for path in entries if path.suffix.lower() in IMAGES and not path.is_dir()]
    unread.update(name_suffix(str(path)) for path in set(entries) - set(images) if not path.is_dir())
    full = {path.relative_to(root).parts[0] for path in images}
    empty = [path.name for path in entries if path.parent == root and path.is_dir() and path.name not in full]
    if not any(path.parent != root for path in images):
        others = ", ".join(sorted({path.suffix or path.name for path in entries})) or "nothing"
        raise ConfigError(f"{name}: no sub-folder with pictures, one for each class (it holds: {others})")
    if empty:
        raise ConfigError(f"{name / empty[0]}: a class without pictures ({', '.join(IMAGES)}). Remove that folder.")
    return images
