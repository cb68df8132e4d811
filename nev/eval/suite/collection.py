"""Sets in the shared space: embedded once for a model, kept beside its checkpoints, shared by every task that needs them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.common.errors import NevError
from nev.config.base import Section
from nev.data.block import Block
from nev.embed.cache import hash_values, load_or_compute
from nev.embed.images import EmbedJob, EncoderSpec, embed_all
from nev.eval.suite.reading import CLEAN, Reading, blocks, corruption_variants
from nev.eval.validation.scoring import Embedded
from nev.storage.files import join, write_atomic
from nev.storage.reading import write_errors_as_data_errors


class Fact(Section):
    """What a row says of itself. extra: what groups are told by; reason: why its picture cannot be decoded."""

    uid: str
    captions: tuple[str, ...]
    name: str | None
    extra: dict[str, Any]
    reason: str


class Collection(NamedTuple):
    """A source's rows in the space, in the order of the source. corrupted: the same pictures by (corruption, severity)."""

    embedded: Embedded
    facts: list[Fact]
    corrupted: dict[tuple[str, int], NDArray[np.float32]]


def collect(
    readings: Sequence[Reading],
    model: str,
    cache: str,
    tower: EncoderSpec,
    block_bytes: int,
    done: Callable[[int], None] = lambda rows: None,
) -> dict[str, Collection | NevError]:
    """The collections of `readings` by their keys, under the model that `model` names; an error for a set that cannot be read.

    They are embedded where `cache` lacks them: a folder or S3 prefix, one file a set and model, written as soon as its set is
    whole. done: is told how many rows more were embedded. Raises DataError where the cache cannot be read or written.
    """
    by_key = {reading.key: reading for reading in readings}
    files = {key: join(cache, f"{hash_values(model, key)}.safetensors") for key in by_key}
    found: dict[str, Collection | NevError] = {}
    for key, file in files.items():
        if (tensors := load_or_compute(file)) is not None:
            found[key] = _collection(tensors)
    lacking = [key for key in by_key if key not in found]
    works = [make_embed_job(by_key[key]) for key in lacking]
    embedded = embed_all(works, tower, block_bytes, done) if works else iter(())
    for key, rows in zip(lacking, embedded, strict=True):
        if isinstance(rows, NevError):
            found[key] = rows
            continue
        own = _ordered(rows)
        with write_errors_as_data_errors(files[key]):
            write_atomic(files[key], _bytes(own))
        found[key] = own
    return found


def make_embed_job(reading: Reading) -> EmbedJob:
    """A reading as the engine takes it."""
    return EmbedJob(reading.units, partial(blocks, read=reading.read, view=reading.view))


def _ordered(rows: Block) -> Collection:
    """Rows as they came, in the order of the source, and its variants apart."""
    if not rows:
        empty = np.empty(0)
        return Collection(Embedded(np.empty((0, 0), np.float32), empty.astype(bool), empty.astype(np.int64)), [], {})
    at = np.lexsort((rows["order"], rows["part"], rows["variant"]))
    rows = {name: column[at] for name, column in rows.items()}
    clean = rows["variant"] == CLEAN
    corrupted = {
        variant: rows["vector"][rows["variant"] == number]
        for number, variant in enumerate(corruption_variants(), start=1)
        if (rows["variant"] == number).any()
    }
    embedded = Embedded(rows["vector"][clean], rows["valid"][clean], rows["label"][clean])
    return Collection(embedded, [Fact.model_validate_json(fact) for fact in rows["facts"][clean]], corrupted)


def _bytes(collection: Collection) -> bytes:
    from safetensors.numpy import save

    tensors = collection.embedded._asdict()
    tensors |= {f"corrupted/{name}/{severity}": vectors for (name, severity), vectors in collection.corrupted.items()}
    facts = json.dumps([fact.model_dump() for fact in collection.facts]).encode()
    return save(tensors | {"facts": np.frombuffer(facts, np.uint8)})


def _collection(found: dict[str, NDArray[Any]]) -> Collection:
    facts = [Fact.model_validate(fact) for fact in json.loads(found["facts"].tobytes())]
    embedded = Embedded(**{name: found[name] for name in Embedded._fields})
    corrupted = {
        (name, severity): found[f"corrupted/{name}/{severity}"]
        for name, severity in corruption_variants()
        if f"corrupted/{name}/{severity}" in found
    }
    return Collection(embedded, facts, corrupted)
