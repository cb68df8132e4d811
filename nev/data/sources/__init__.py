"""Readers of foreign formats. Each is a generator: (inputs, options) -> rows, faults and all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nev.data.rows import Row
from nev.data.sources import datacomp, folder, hf_parquet, webdataset
from nev.data.sources.common import SourceOptions, find_files

Reader = Callable[[Iterable[str | Path], SourceOptions], Iterator[Row]]

READERS: dict[str, Reader] = {
    "webdataset": webdataset.read,
    "hf-parquet": hf_parquet.read,
    "datacomp": datacomp.read,
    "folder-captions": folder.read_captions,
    "folder-classes": folder.read_classes,
}

__all__ = ["READERS", "Reader", "SourceOptions", "find_files"]
