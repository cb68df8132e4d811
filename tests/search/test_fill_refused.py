"""What `nev index` refuses before it writes: tables of other encoders, uids that are taken, and files that cannot be read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.fill import WORDS, make_table, names, pictures, refused, run, with_prompts, write_texts
from helpers.search import draw_vectors, make_store, write_pictures

from nev.inference.model import Model
from nev.search.store import SearchError, StoreSpec, Upserted, VectorStore, make_items


def test_binary_vectors_are_refused(lance: VectorStore, model: Model, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "vectors", model, names(), pictures(model.width), "binary")
    refused(lance, model, "binary vectors are compared by Hamming distance", images=folder)


def test_a_table_of_another_encoder_is_refused_with_the_cosine(
    store: VectorStore, model: Model, other: Model, tmp_path: Path
) -> None:
    make_table(store, other)
    folder = write_pictures(tmp_path / "vectors", model, names(), pictures(model.width))
    refused(
        store,
        model,
        rf"was made by another text encoder than small.*: {len(WORDS)} of its texts, embedded again, have a median cosine with "
        r"the stored vectors of -?0\.\d\d\d as document .*the same encoder gives 0\.99 or more\. Nothing was written",
        images=folder,
    )
    assert store.count() == len(WORDS)
    refused(store, None, r"name the model \(--model\), since nothing records", images=folder)
    plan, _ = run(store, model, images=folder, unverified=True)
    assert plan.is_vouched
    spec = store.read_spec()
    assert spec is not None
    assert spec.text_fingerprint is None, "what nobody has verified is not recorded"


def test_a_table_of_two_encoders_is_refused_by_its_share(lance: VectorStore, model: Model, tmp_path: Path) -> None:
    vectors = model.encode_text(WORDS, kind="document")
    mixed = np.arange(len(WORDS)) % 5 < 2
    vectors[mixed] = draw_vectors(int(mixed.sum()), 9, 0.0, model.width)
    lance.apply_changes(model.width)
    lance.upsert(make_items("text", [f"t{n}" for n in range(len(WORDS))], vectors, text=WORDS))
    folder = write_pictures(tmp_path / "vectors", model, names(), pictures(model.width))
    refused(lance, model, rf"{mixed.mean():.0%} of {len(WORDS)} texts, .*mixes encoders", images=folder)


def test_a_recorded_encoder_is_compared_by_its_fingerprint(
    lance: VectorStore, model: Model, other: Model, tmp_path: Path
) -> None:
    make_table(lance, model)
    lance.write_spec(StoreSpec(width=model.width, text_fingerprint=model.text_fingerprint))
    folder = write_pictures(tmp_path / "vectors", model, names(), pictures(model.width))
    plan, _ = run(lance, None, images=folder)
    assert plan.agreement is None, "nothing is embedded again"
    wrong = write_pictures(tmp_path / "wrong", other, ["b"], pictures(model.width, 1))
    start = model.text_fingerprint[:12]
    refused(
        lance,
        None,
        f"holds vectors of the text encoder {start}, as is recorded there",
        images=wrong,
        replace_images=True,
    )


def test_both_prompts_are_in_the_message(lance: VectorStore, model: Model, other: Model, tmp_path: Path) -> None:
    make_table(lance, other)
    two = with_prompts(model, "query: ", "passage: ")
    folder = write_pictures(tmp_path / "vectors", two, names(), pictures(model.width))
    refused(lance, two, r"as document \(lowest .*\) and .* as query \(lowest", images=folder)


def test_another_width_is_refused_first(store: VectorStore, model: Model, tmp_path: Path) -> None:
    make_table(store, model)
    folder = write_pictures(tmp_path / "vectors", model, names(), pictures(32))
    refused(store, None, f"has vectors of {model.width} numbers, and .* of 32", images=folder)


def test_a_table_without_texts_needs_a_word_of_the_user(lance: VectorStore, model: Model, tmp_path: Path) -> None:
    lance.apply_changes(model.width)
    lance.upsert(make_items("text", ["a", "b"], pictures(model.width, 2), text=pa.array([None, "  "], pa.string())))
    folder = write_pictures(tmp_path / "vectors", model, names(), pictures(model.width))
    refused(lance, model, r"no text in column text to embed again\. Name the column \(--text-column\)", images=folder)
    assert run(lance, model, images=folder, unverified=True)[1].images.inserted == 20


def test_a_picture_never_takes_the_place_of_a_text(store: VectorStore, model: Model, tmp_path: Path) -> None:
    make_table(store, model)
    folder = write_pictures(tmp_path / "vectors", model, ["x", "t4", "t2"], pictures(model.width, 3))
    refused(store, model, "2 uids of pictures are of texts there: t2, t4", images=folder)
    before = store.read(["t4"]).to_pylist()
    with pytest.raises(SearchError):  # the store refuses it, too, whoever calls
        store.upsert(make_items("image", ["t4"], pictures(model.width, 1)))
    assert store.read(["t4"]).to_pylist() == before


def test_a_text_never_takes_the_place_of_a_picture_or_of_other_words(
    store: VectorStore, model: Model, tmp_path: Path
) -> None:
    folder = write_pictures(tmp_path / "vectors", model, names(), pictures(model.width))
    first = write_texts(tmp_path / "a.jsonl", [{"uid": "a", "text": "a dog"}, {"uid": "b", "text": "a cat"}])
    run(store, model, images=folder, texts=first)
    wrong = write_texts(tmp_path / "b.jsonl", [{"uid": "a/3.jpg", "text": "a dog"}])
    refused(store, model, r"1 uids of texts are of pictures there: a/3\.jpg", texts=wrong)
    refused(store, model, r"1 uids are of pictures and of texts: a/3\.jpg", texts=wrong, images=folder)
    changed = write_texts(tmp_path / "c.jsonl", [{"uid": "a", "text": "a wolf"}, {"uid": "b", "text": "a cat"}])
    refused(store, model, "1 texts are there with other words: a. --replace-texts", texts=changed)
    plan, filled = run(store, model, texts=changed, replace_texts=True)
    assert (plan.texts, plan.same_texts, filled.texts) == (1, 1, Upserted(0, 1))
    row = store.read(["a"]).to_pylist()[0]
    assert row["text"] == "a wolf"
    assert np.allclose(row["vector"], model.encode_text("a wolf", kind="document"), atol=1e-5)


def test_pictures_of_two_vision_encoders_are_not_mixed(store: VectorStore, model: Model, tmp_path: Path) -> None:
    first = write_pictures(tmp_path / "first", model, names(), pictures(model.width))
    file = write_texts(tmp_path / "a.jsonl", [{"uid": "a", "text": "a dog"}])
    run(store, model, images=first, texts=file)
    spec = model.spec.model_copy(update={"vision_fingerprint": "f" * 64, "name": "second", "calibration": None})
    second = write_pictures(
        tmp_path / "second", replace(model, spec=spec), ["n1", "n2"], pictures(model.width, 2, seed=9)
    )
    refused(
        store,
        None,
        rf"has 20 pictures of small \({model.fingerprint[:12]}\), and .* is of second \(ffffffffffff\).*--replace-images",
        images=second,
    )
    _, filled = run(store, None, images=second, replace_images=True)
    assert (filled.deleted_images, filled.images, filled.rows) == (20, Upserted(2, 0), {"image": 2, "text": 1})
    recorded = store.read_spec()
    assert recorded is not None
    assert (recorded.model, recorded.calibration) == ("second", None), "the means are not those of the former model"
    assert store.read(names()).num_rows == 0


def test_pictures_that_nev_has_not_written_are_neither_joined_nor_deleted(
    store: VectorStore, model: Model, tmp_path: Path
) -> None:
    store.apply_changes(model.width)
    store.upsert(make_items("image", ["theirs"], pictures(model.width, 1, seed=3)))
    folder = write_pictures(tmp_path / "vectors", model, names(), pictures(model.width))
    for replace_images in (False, True):
        says = "has 1 rows that say they are pictures .*nev neither mixes"
        refused(store, model, says, images=folder, replace_images=replace_images)
    refused(store, model, "--replace-images writes others", texts="absent.jsonl", replace_images=True)
    assert store.read(["theirs"]).num_rows == 1


def test_vectors_of_another_model_than_the_named_one(
    lance: VectorStore, model: Model, other: Model, tmp_path: Path
) -> None:
    folder = write_pictures(tmp_path / "vectors", model, names(), pictures(model.width))
    refused(lance, other, "holds vectors of small, whose text encoder is another one", images=folder)
    spec = model.spec.model_copy(update={"vision_fingerprint": "f" * 64})
    refused(lance, replace(model, spec=spec), "and --model is small .ffffffffffff.", images=folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("texts.csv", "uid,text", "a file of texts is .parquet or .jsonl"),
        ("texts.jsonl", '{"uid": "a", "text": "b"}\n{oops', "line 2: no JSON"),
        ("texts.jsonl", '{"uid": "a", "text": 3}', 'line 1: a line is {"uid"'),
        ("texts.jsonl", '["a", "b"]', "line 1: a line is"),
        ("texts.jsonl", '{"uid": "a", "text": "b"}\n{"uid": "a", "text": "c"}', "1 uids come twice: a"),
        ("texts.parquet", "not parquet", "cannot be read"),
    ],
)
def test_a_file_that_is_no_file_of_texts(
    lance: VectorStore, model: Model, tmp_path: Path, file: str, content: str, message: str
) -> None:
    (tmp_path / file).write_text(content)
    refused(lance, model, message, texts=str(tmp_path / file))
    refused(lance, model, "texts.jsonl cannot be read", texts=str(tmp_path / "missing" / "texts.jsonl"))


def test_nothing_to_do(lance: VectorStore, model: Model, tmp_path: Path) -> None:
    refused(lance, model, "nothing to index")
    file = write_texts(tmp_path / "a.jsonl", [{"uid": "a", "text": "a dog"}])
    refused(lance, None, r"name the model \(--model\), since texts are embedded by it", texts=file)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("exact", {"ann": "hnsw"}, "--ann hnsw is of LanceDB and PostgreSQL"),
        ("exact", {"full_text": True}, "--full-text is of LanceDB and PostgreSQL"),
        ("postgres", {"ann": "ivf"}, "--ann ivf is of LanceDB"),
    ],
)
def test_an_index_that_the_store_cannot_make_is_refused_before_a_write(
    request: pytest.FixtureRequest, model: Model, tmp_path: Path, kind: str, options: dict[str, Any], message: str
) -> None:
    address = request.getfixturevalue("postgres") if kind == "postgres" else ""
    store = make_store(kind, tmp_path, address)
    folder = write_pictures(tmp_path / "vectors", model, names(), pictures(model.width))
    refused(store, None, message, images=folder, **options)
    assert store.width is None
