"""The folder of a corpus's vectors: which parts are there, and whether they are those of this command.

`part-STAMP.parquet` is the vector file of a part; the stamp changes with the files of the part. `_bad/part-STAMP.parquet` lists
its pictures that cannot be used. The metadata of a vector file say what it was made by, so the folder needs no other record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from pydantic import ValidationError

from nev.common.errors import first_few
from nev.config.base import ConfigError, Section
from nev.data.rows import MAX_REASONS
from nev.data.uids import Keys, hash_uids
from nev.data.vectors import VectorSpec, list_vector_files, read_spec, read_vectors
from nev.storage.files import PARALLEL_REQUESTS, filesystem, is_damage, is_local, join, open_parquet
from nev.storage.reading import DataError, read_errors_as_data_errors, write_errors_as_data_errors

PART_KEY = "nev.part"  # of the metadata
BAD, WRITING = "_bad", "_writing"  # folders


class PartSpec(Section):
    """The part of the input that a vector file holds."""

    stamp: str
    """Stamp of the part."""
    settings: dict[str, Any]
    """What decides the rows and columns of all parts: the input, how it is read, captions, thumbnails."""
    rows: int
    """Rows with a vector."""
    bad: dict[str, int]
    """Rows without one, by reason."""


def part_location(output: str, stamp: str) -> str:
    """Path or URL of the vector file of a part."""
    return join(output, f"part-{stamp}.parquet")


def bad_location(output: str, stamp: str) -> str:
    """Path or URL of the list of a part's pictures that cannot be used."""
    return join(output, BAD, f"part-{stamp}.parquet")


def writing_folder(output: str) -> str:
    """The folder in which local files lie until they are complete."""
    return join(filesystem(output)[1], WRITING)


def find_finished(output: str, spec: VectorSpec, settings: dict[str, Any]) -> dict[str, PartSpec]:
    """The parts whose vector files are in the folder, by stamp. A damaged file counts as absent.

    Raises ConfigError for files of another model, or of other settings.
    """
    here = {**spec.model_dump(mode="json"), **settings}

    def read(location: str) -> PartSpec | None:
        part = _read_part(output, location, here)
        return part and part.model_copy(update={"settings": settings})  # one of these for all parts

    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        parts = pool.map(read, list_vector_files(output, may_be_empty=True))
        return {part.stamp: part for part in parts if part}


def _read_part(output: str, location: str, here: dict[str, Any]) -> PartSpec | None:
    """The part that a vector file holds. None for a damaged file. here: what this command would write in the metadata."""
    fs, path = filesystem(location)
    try:
        with read_errors_as_data_errors(location, ""), open_parquet(fs, path) as file:
            footer = pq.ParquetFile(file)
            schema, metadata = footer.schema_arrow, footer.metadata.metadata or {}
    except DataError as error:
        if is_damage(error.__cause__):
            return None
        raise
    spec, raw = read_spec(schema, location), metadata.get(PART_KEY.encode())
    if not raw:
        raise ConfigError(f"{location}: not of `nev embed-images --model`. Give another --output.")
    try:
        part = PartSpec.model_validate_json(raw)
    except ValidationError as error:
        raise DataError(f"{location}: its metadata cannot be read ({error}). Delete it.") from error
    there = {**spec.model_dump(mode="json"), **part.settings}
    differing = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if differing:
        pairs = [f"{name} {_short(there.get(name))} there, {_short(here.get(name))} here" for name in differing]
        raise ConfigError(
            f"{output}: has vectors of another model, or made with other options ({first_few(pairs)}). Give another --output, or "
            "delete this one."
        )
    return part


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:20]}..."


def prune_stale(output: str, stale: Iterable[str], prune: bool) -> int:
    """Delete the files of parts whose input has changed or is gone, if `prune`; else raise ConfigError. Returns their number."""
    stamps = sorted(stale)
    if not stamps:
        return 0
    if not prune:
        raise ConfigError(
            f"{output}: {len(stamps)} vector files are of input that has changed or is gone ({part_location('', stamps[0])[1:]}, "
            "...). With --prune they are deleted, and the changed input is embedded again. Or give another --output."
        )
    with write_errors_as_data_errors(output):
        for stamp in stamps:
            for location in (part_location(output, stamp), bad_location(output, stamp)):
                fs, path = filesystem(location)
                if fs.exists(path):
                    fs.rm_file(path)
    return len(stamps)


def remove_unfinished(output: str) -> None:
    """Remove what killed processes have left of files that they were writing."""
    fs, folder = filesystem(output)[0], writing_folder(output)
    if is_local(fs) and fs.exists(folder):
        with write_errors_as_data_errors(output):
            fs.rm(folder, recursive=True)


def count_reasons(*counts: Mapping[str, int]) -> dict[str, int]:
    """The sum of counts by reason. Reasons beyond MAX_REASONS, which may have numbers of the picture in them, are one."""
    total = Counter[str]()
    for each in counts:
        for reason, count in each.items():
            total[reason if reason in total or len(total) < MAX_REASONS else "other reasons"] += count
    return dict(total)


def count_repeated_uids(output: str) -> int:
    """Vectors in the folder whose uid another vector has. Takes 32 bytes of memory a vector."""

    def read_keys(location: str) -> Keys:
        return hash_uids(read_vectors(location, ["uid"])["uid"].to_pylist())

    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        keys = np.concatenate(list(pool.map(read_keys, list_vector_files(output))))
    return len(keys) - len(np.unique(keys))
