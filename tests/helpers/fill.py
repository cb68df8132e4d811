"""Steps of tests of `nev index`: texts and pictures to add, tables of other programs, and plans that are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from helpers.search import draw_vectors
from nev.config.model_spec import ModelSpec
from nev.inference.model import Model
from nev.ops.vectors import Floats
from nev.search.fill import Filled, fill
from nev.search.plan import Options, Plan, Task, make_plan
from nev.search.store import SearchError, VectorStore, make_items

WORDS = [
    f"a {colour} {shape} number {n}" for n in range(3) for colour in ("red", "blue") for shape in ("dog", "cat", "car")
]


def pictures(width: int, count: int = 20, seed: int = 3) -> Floats:
    return draw_vectors(count, seed, 0.5, width)


def names(count: int = 20) -> list[str]:
    return [f"a/{row}.jpg" for row in range(count)]


def write_texts(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(file)


def run(store: VectorStore, model: Model | None, **options: Any) -> tuple[Plan, Filled]:
    task = Task(store, Options(**options), (lambda: model) if model else None)
    plan = make_plan(task)
    return plan, fill(task, plan)


def refused(store: VectorStore, model: Model | None, match: str, **options: Any) -> None:
    """The plan is refused, with a message that matches."""
    with pytest.raises(SearchError, match=match):
        make_plan(Task(store, Options(**options), (lambda: model) if model else None))


def everything(store: VectorStore) -> list[dict[str, Any]]:
    both = (store.sample(kind, 10_000)["uid"].to_pylist() for kind in ("image", "text"))
    return store.read([uid for uids in both for uid in uids]).sort_by("uid").to_pylist()


def make_table(store: VectorStore, model: Model, prompt: str = "document", uids: str = "t") -> list[str]:
    """A table of text vectors as another program makes it: nothing is recorded. Of any length, as not all programs scale them."""
    vectors = model.encode_text(WORDS, kind=prompt)  # type: ignore[call-overload]
    store.apply_changes(model.width)
    given = [f"{uids}{n}" for n in range(len(WORDS))]
    items = make_items("text", given, vectors, text=pa.array(WORDS))
    store.upsert(items)
    return given


def with_prompts(model: Model, query: str, document: str) -> Model:
    spec: ModelSpec = model.spec.model_copy(update={"prompts": {"query": query, "document": document}})
    return replace(model, spec=spec)
