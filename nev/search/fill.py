"""Fills an index: texts by a model, pictures from vector files, into a new table or beside the texts of a table that exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from nev.data.vectors import as_array, iterate_vectors
from nev.ops.vectors import are_usable
from nev.search.encoder_check import Prompt
from nev.search.plan import Plan, Task, find_rows
from nev.search.store import IMAGE, TEXT, StoreSpec, Upserted, make_items

CHUNK = 4096  # texts that are embedded, and written, at a time


class Filled(NamedTuple):
    """What was done.

    texts, images: rows written. deleted_images: pictures that were there before.
    indexes: what there is now, as sentences. rows: items with a vector, by kind. without_vector: rows that no search finds.
    """

    texts: Upserted
    images: Upserted
    deleted_images: int
    indexes: list[str]
    rows: dict[str, int]
    without_vector: int


def fill(task: Task, plan: Plan, advance: Callable[[int], object] = lambda count: None) -> Filled:
    """Write what was planned by `make_plan`. advance: gets the number of items whenever some were written.

    After an interruption the same call writes what is missing.
    """
    store, options = task.store, task.options
    store.apply_changes(task.width)
    deleted = store.delete_images() if options.replace_images else 0
    spec = _make_spec(task, plan)
    if spec != store.read_spec():
        store.write_spec(spec)
    texts, images = Upserted(0, 0), Upserted(0, 0)
    for items in _embed_texts(task, spec.text_prompt):
        texts = _add(texts, store.upsert(items))
        advance(items.num_rows)
    for items in _read_images(task):
        images = _add(images, store.upsert(items))
        advance(items.num_rows)
    indexes = store.build(options.ann, plan.is_new if options.full_text is None else options.full_text)
    rows = {IMAGE: store.count(IMAGE), TEXT: store.count(TEXT)}
    return Filled(texts, images, deleted, indexes, rows, store.count_without_vector())


def _make_spec(task: Task, plan: Plan) -> StoreSpec:
    """What is recorded in the store."""
    recorded = None if plan.is_new else task.store.read_spec()  # a dropped table may have left its record
    former, spec = recorded or StoreSpec(width=task.width), task.vector_spec
    changes: dict[str, object] = {
        "text_fingerprint": None if plan.is_vouched else task.text_fingerprint,
        "columns": task.store.columns,
    }
    if plan.agreement:
        changes["text_prompt"] = plan.agreement.prompt
    if spec:
        same = former.calibration if former.fingerprint == spec.fingerprint else None
        changes |= {
            "model": spec.model,
            "fingerprint": spec.fingerprint,
            "calibration": spec.calibration or same,
        }
    return former.model_copy(update=changes)


def _embed_texts(task: Task, prompt: Prompt) -> Iterator[pa.Table]:
    """Texts that are not there yet, or have other words there. prompt: that of the table's vectors."""
    uids, texts, _ = task.text_file
    for start in range(0, len(uids), CHUNK):
        part = uids[start : start + CHUNK]
        stored = find_rows(task.store, part, TEXT)
        new = [
            (uid, text) for uid, text in zip(part, texts[start : start + CHUNK], strict=True) if stored.get(uid) != text
        ]
        if new:
            words = [text for _, text in new]
            vectors = task.model.encode_text(words, kind=prompt, width=task.width, progress=False)
            yield make_items(TEXT, [uid for uid, _ in new], vectors, text=pa.array(words, pa.string()))


def _read_images(task: Task) -> Iterator[pa.Table]:
    """The pictures of each vector file, without those whose vector has no direction."""
    for table in iterate_vectors(task.options.images) if task.options.images else ():
        vectors = as_array(table["vector"]).astype(np.float32)
        usable = are_usable(vectors)
        table, vectors = table.filter(pa.array(usable)), vectors[usable]
        columns = {name: table[name] for name in ("source", "thumbnail") if name in table.column_names}
        if "caption" in table.column_names:
            captions = [next(filter(None, each or ()), None) for each in table["caption"].to_pylist()]
            columns["text"] = pa.array(captions, pa.string())
        if table.num_rows:
            yield make_items(IMAGE, table["uid"].to_pylist(), vectors, **columns)


def _add(left: Upserted, right: Upserted) -> Upserted:
    return Upserted(left.inserted + right.inserted, left.updated + right.updated)
