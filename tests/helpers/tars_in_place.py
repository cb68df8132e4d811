"""Tars of a few samples, their indexes, and a reader of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.pictures import encoded, photo
from helpers.tars import tar_of
from nev.config.data import Limits
from nev.data.block import BlockReader
from nev.data.index import Index
from nev.data.prepare.in_place import index_tars
from nev.data.prepare.pipeline import PrepareReport
from nev.data.sources import SourceOptions, find_files

GROUP = 4  # rows of a row group
ROWS = 10  # of a tar


def members(first: int, count: int = ROWS) -> dict[str, Any]:
    """Samples as img2dataset writes them; the second one has several captions, in its JSON."""
    samples: dict[str, Any] = {}
    for number in range(first, first + count):
        key = f"{number:05d}"
        samples[f"{key}.jpg"] = encoded(photo(number))
        samples[f"{key}.txt"] = f"picture {number}"
        captions = {"captions": [f"picture {number}", "another"]} if number % ROWS == 1 else {}
        samples[f"{key}.json"] = {"uid": f"row-{number}", "score": number / 100, "status": "success", **captions}
    return samples


def write_tars(folder: Path, count: int = 3) -> Path:
    for number in range(count):
        tar_of(folder / f"{number:05d}.tar", members(ROWS * number))
    return folder


def index_folder(folder: str | Path, output: str | None = None, **more: Any) -> PrepareReport:
    settings = {"row_group_rows": GROUP, **more}
    options = settings.pop("options", SourceOptions())
    return index_tars(find_files([folder], (".tar", ".tar.gz")), output or f"{folder}/nev-index", options, **settings)


def reader_over(index: Index, **more: Any) -> BlockReader:
    return BlockReader(index, 16, Limits(), 3, None, **more)
