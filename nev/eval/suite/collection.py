"""Sets in the shared space: embedded once for each model, cached beside its checkpoints, shared by the tasks of a suite."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from nev.common.errors import NevError
from nev.config.base import Section
from nev.data.block import Block
from nev.data.decode import Picture
from nev.embed.cache import hash_values, load_cached
from nev.embed.images import EmbedJob, EncoderSpec, embed_all
from nev.eval.suite.reading import CLEAN, Reading, blocks, corruption_variants, read_pictures
from nev.eval.suite.vectors import Embedded
from nev.storage.files import join, write_atomic
from nev.storage.reading import write_errors_as_data_errors


class Fact(Section):
    """A row of a set, without its picture.

    name: class name. extra: fields that a task groups rows by. reason: why the picture cannot be decoded; empty where it can.
    """

    uid: str
    captions: tuple[str, ...] = ()
    name: str | None = None
    extra: dict[str, Any] = Field(default={})
    reason: str = ""


class Collection(NamedTuple):
    """A set in the shared space, in the order of its source.

    facts: one for each row; empty where no task needs them.
    corrupted: vectors of the same pictures under (corruption, severity), float32 [n, D] each.
    """

    embedded: Embedded
    facts: list[Fact]
    corrupted: Mapping[tuple[str, int], NDArray[np.float32]]


def collect(
    readings: Sequence[Reading],
    model: str,
    cache: str,
    tower: EncoderSpec,
    block_bytes: int,
    on_progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, Collection | NevError]:
    """The collections of `readings` by their keys; an error in the place of a set that cannot be read.

    model: fingerprint of the vision tower.
    cache: folder or S3 prefix, with one file for each set and model. A set is embedded where its file is absent, and the file is
    written as soon as the set is whole.
    block_bytes: size of a block of pictures, about.
    on_progress: called with the number of rows embedded since the last call.
    Raises DataError where the cache cannot be read or written.
    """
    by_key = {reading.key: reading for reading in readings}
    files = {key: join(cache, f"{hash_values(model, key)}.safetensors") for key in by_key}
    collections: dict[str, Collection | NevError] = {}
    for key, file in files.items():
        if (tensors := load_cached(file)) is not None:
            collections[key] = _from_tensors(tensors)
    missing = [key for key in by_key if key not in collections]
    jobs = [make_embed_job(by_key[key]) for key in missing]
    embedded = embed_all(jobs, tower, block_bytes, on_progress) if jobs else iter(())
    for key, rows in zip(missing, embedded, strict=True):
        if isinstance(rows, NevError):
            collections[key] = rows
            continue
        collection = _in_order(rows)
        with write_errors_as_data_errors(files[key]):
            write_atomic(files[key], _to_bytes(collection))
        collections[key] = collection
    return collections


def read_row_pictures(collection: Collection, reading: Reading, rows: Sequence[int]) -> list[Picture]:
    """What the model sees of some rows, uint8 [S, S, 3] each; white for a picture that cannot be decoded."""
    views = read_pictures(reading, {collection.facts[row].uid for row in rows})
    white = np.full((reading.view.size, reading.view.size, 3), 255, np.uint8)
    return [views.get(collection.facts[row].uid, white) for row in rows]


def make_embed_job(reading: Reading) -> EmbedJob:
    """The job that decodes and embeds a reading."""
    return EmbedJob(reading.units, partial(blocks, read=reading.read, view=reading.view))


def _in_order(rows: Block) -> Collection:
    """Rows in the order of the source, its corrupted variants apart."""
    if not rows:
        empty = np.empty(0)
        return Collection(Embedded(np.empty((0, 0), np.float32), empty.astype(bool), empty.astype(np.int64)), [], {})
    order = np.lexsort((rows["order"], rows["part"], rows["variant"]))
    rows = {name: column[order] for name, column in rows.items()}
    clean = rows["variant"] == CLEAN
    corrupted = {
        variant: rows["vector"][rows["variant"] == number]
        for number, variant in enumerate(corruption_variants(), start=1)
        if (rows["variant"] == number).any()
    }
    embedded = Embedded(rows["vector"][clean], rows["valid"][clean], rows["label"][clean])
    return Collection(embedded, [Fact.model_validate_json(fact) for fact in rows["facts"][clean]], corrupted)


def _to_bytes(collection: Collection) -> bytes:
    from safetensors.numpy import save

    tensors = collection.embedded._asdict()
    tensors |= {f"corrupted/{name}/{severity}": vectors for (name, severity), vectors in collection.corrupted.items()}
    facts = json.dumps([fact.model_dump() for fact in collection.facts]).encode()
    return save(tensors | {"facts": np.frombuffer(facts, np.uint8)})


def _from_tensors(tensors: dict[str, NDArray[Any]]) -> Collection:
    facts = [Fact.model_validate(fact) for fact in json.loads(tensors["facts"].tobytes())]
    embedded = Embedded(**{name: tensors[name] for name in Embedded._fields})
    corrupted = {
        (name, severity): tensors[f"corrupted/{name}/{severity}"]
        for name, severity in corruption_variants()
        if f"corrupted/{name}/{severity}" in tensors
    }
    return Collection(embedded, facts, corrupted)
