"""Readers of foreign formats. Each is a function (inputs, options) -> Source. A source yields rows with their faults."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from nev.data.sources import datacomp, folder, hf_parquet, pictures, webdataset
from nev.data.sources.common import Part, Source, SourceOptions, iterate_rows, make_source, take_first
from nev.data.sources.input_files import find_files, refuse_inside

SOURCES: dict[str, Callable[[Iterable[str | Path], SourceOptions], Source]] = {
    "webdataset": webdataset.source,
    "hf-parquet": hf_parquet.source,
    "datacomp": datacomp.source,
    "folder-captions": folder.captions,
    "folder-classes": folder.classes,
    "folder": pictures.source,
}

__all__ = [
    "SOURCES",
    "Part",
    "Source",
    "SourceOptions",
    "find_files",
    "iterate_rows",
    "make_source",
    "refuse_inside",
    "take_first",
]
