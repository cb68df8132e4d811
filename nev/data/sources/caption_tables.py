"""Tables of captions: .csv, .tsv, .jsonl, and COCO's captions.json."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nev.config.base import ConfigError
from nev.config.data import Columns

TABLES = (".csv", ".tsv", ".jsonl")  # of a folder; a .json beside them may be anything, and is read where it is named
FILE_COLUMNS = ("file_name", "filename", "file", "filepath", "image", "path")
CAPTION_COLUMNS = ("caption", "text", "title")

Captions = dict[str, list[str]]


def read_captions(table: Path, columns: Columns) -> Captions:
    """Captions by file name, in the order in which the files first appear in the table.

    Raises ConfigError, with the line, for a table that cannot be read, has not the columns, or has captions that are no text.
    """
    captions: Captions = {}
    try:
        with open(table, encoding="utf-8-sig", newline="") as text:
            lines = _choose_reader(table)(text, table)
            file_column = caption_column = ""
            for number, cells in lines:
                if not file_column:
                    file_column = _column(cells, columns.image, FILE_COLUMNS, f"{table}: no column of files")
                    caption_column = _column(cells, columns.caption, CAPTION_COLUMNS, f"{table}: no column of captions")
                name, caption = cells.get(file_column), cells.get(caption_column)
                if not name or not isinstance(name, str):
                    raise ConfigError(f"{table}:{number}: no file name in column {file_column!r}")
                sentences = caption if isinstance(caption, list) else [caption]
                for sentence in sentences:
                    _check_caption(sentence, f"{table}:{number}", caption_column)
                captions.setdefault(_with_slashes(name, table), []).extend(
                    item for item in sentences if isinstance(item, str)
                )
    except UnicodeDecodeError as error:
        marked = error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise ConfigError(
            f"{table}: not in UTF-8 (byte {error.object[error.start]:#04x} at {error.start:,}). Save it as UTF-8, for instance "
            f"by iconv -f {'utf-16' if marked else 'cp1252'} -t utf-8 {table.name} > utf8-{table.name}"
        ) from error
    except (OSError, csv.Error) as error:
        raise ConfigError(
            f"{table}: not readable as a table ({error}). In a CSV or TSV a quote inside a caption is written twice, "
            "and the caption in quotes."
        ) from error
    if not captions:
        raise ConfigError(f"{table}: no line names a picture")
    return captions


def _choose_reader(table: Path) -> Any:
    return {".jsonl": _read_json_lines, ".json": _read_coco}.get(table.suffix.lower(), _read_cells)


def _check_caption(caption: object, where: str, column: str) -> None:
    """Raise ConfigError for a caption that is no text. A caption that is missing is none."""
    if caption is None or isinstance(caption, str) or caption != caption:  # NaN, as pandas writes what is missing
        return
    if isinstance(caption, dict):
        raise ConfigError(
            f"{where}: {column!r} is an object with the keys {', '.join(caption)}, and a text is needed: write one of them into "
            "a column of its own"
        )
    raise ConfigError(f"{where}: {column!r} is {caption!r}, and a text is needed: write it in quotes")


def _with_slashes(name: str, table: Path) -> str:
    """The path of a file; of a table that Windows has written, with slashes."""
    return name.replace("\\", "/") if "\\" in name and not (table.parent / name).exists() else name


def _read_coco(text: Iterable[str], table: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """COCO's captions: `images` with `id` and `file_name`, `annotations` with `image_id` and `caption`."""
    try:
        content = json.loads("".join(text))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{table}: not JSON ({error})") from error
    try:
        files = {image["id"]: image["file_name"] for image in content["images"]}
        pairs = [(files[each["image_id"]], each["caption"]) for each in content["annotations"]]
    except (KeyError, TypeError, IndexError) as error:
        raise ConfigError(
            f"{table}: not COCO's captions ({type(error).__name__}: {error}): it needs `images` with id and file_name, and "
            "`annotations` with image_id and caption. A table of one JSON object a line is .jsonl"
        ) from error
    for number, (name, caption) in enumerate(pairs, start=1):
        yield number, {"file_name": name, "caption": caption}


def _read_cells(text: Iterable[str], table: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """The lines of a CSV or TSV: (line number, cells by column).

    The first line shows the delimiter: a .csv may have commas, tabs (open_clip) or semicolons. Raises csv.Error for an unpaired
    quote, which would swallow lines.
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


def _read_json_lines(text: Iterable[str], table: Path) -> Iterator[tuple[int, dict[str, object]]]:
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
