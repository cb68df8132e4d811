"""`nev index`: into a new table and into one that exists, and all that it refuses before it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.models import make_experiment, write_bert, write_checkpoint
from helpers.search import STORES, draw_vectors, make_store, write_pictures
from typer.testing import CliRunner

import nev
from nev.commands.main import app
from nev.config.model_spec import ModelSpec
from nev.inference.model import Model
from nev.ops.vectors import Floats
from nev.search.fill import Filled, fill
from nev.search.index import open_index
from nev.search.plan import Options, Plan, Task, make_plan
from nev.search.store import SearchError, StoreSpec, Upserted, VectorStore, make_items

WORDS = [
    f"a {colour} {shape} number {n}" for n in range(3) for colour in ("red", "blue") for shape in ("dog", "cat", "car")
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(make_experiment(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def model(checkpoint: str) -> Model:
    return nev.load(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model of the same width, with another vision tower and another text encoder."""
    folder = tmp_path_factory.mktemp("other")
    encoder = write_bert(folder / "another", layers=2)
    text = {"encoder": str(encoder), "max_tokens": 24}
    return nev.load(write_checkpoint(make_experiment(folder, text=text), seed=5), device="cpu")


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> VectorStore:
    """A store of each kind, without a table."""
    address = request.getfixturevalue("postgres") if request.param == "postgres" else ""
    return make_store(request.param, tmp_path, address)


@pytest.fixture
def lance(tmp_path: Path) -> VectorStore:
    return make_store("lancedb", tmp_path)


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


def test_a_new_index_twice(store: VectorStore, model: Model, tmp_path: Path) -> None:
    texts = [{"uid": f"t{n}", "text": text} for n, text in enumerate(WORDS)]
    file = write_texts(
        tmp_path / "texts.jsonl", [*texts, {"uid": "none", "text": None}, {"uid": "blank", "text": "  "}]
    )
    vectors = pictures(model.width)
    columns = {"caption": [["a red dog", "second"], []] * 10, "source": ["x"] * 20, "thumbnail": [b"jpeg"] * 20}
    folder = write_pictures(tmp_path / "vectors", model, names(), vectors, **columns)
    plan, filled = run(store, model, images=folder, texts=file)
    assert plan.is_new
    assert (plan.images, plan.texts, plan.empty_texts) == (20, len(WORDS), 2)
    assert (filled.images, filled.texts) == (Upserted(20, 0), Upserted(len(WORDS), 0))
    assert filled.rows == {"image": 20, "text": len(WORDS)}
    rows = {row["uid"]: row for row in everything(store)}
    assert np.allclose(rows["t3"]["vector"], model.encode_text(WORDS[3], kind="document"), atol=1e-5)
    picture = rows["a/0.jpg"]
    assert (picture["kind"], picture["text"], picture["source"], picture["thumbnail"]) == (
        "image",
        "a red dog",
        "x",
        b"jpeg",
    )
    assert rows["a/1.jpg"]["text"] is None
    assert np.allclose(picture["vector"], vectors[0], atol=1e-6)
    spec = store.read_spec()
    assert spec is not None
    assert (spec.fingerprint, spec.text_fingerprint) == (model.fingerprint, model.text_fingerprint)
    assert spec.calibration == model.spec.calibration

    before = everything(store)
    plan, filled = run(store, model, images=folder, texts=file)
    assert (plan.texts, plan.same_texts, plan.changes) == (0, len(WORDS), [])
    assert (filled.images, filled.texts) == (Upserted(0, 20), Upserted(0, 0))
    assert everything(store) == before


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_vectors_of_fewer_bits_are_taken_by_their_direction(
    lance: VectorStore, model: Model, tmp_path: Path, precision: str
) -> None:
    vectors = pictures(model.width)
    run(lance, None, images=write_pictures(tmp_path / "vectors", model, names(), vectors, precision))
    found = np.array([row["vector"] for row in lance.read(names()).sort_by("uid").to_pylist()])
    expected = vectors[np.argsort(names())]
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert (found * expected).sum(axis=1).min() > 0.999


def test_binary_vectors_are_refused(lance: VectorStore, model: Model, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "vectors", model, names(), pictures(model.width), "binary")
    refused(lance, model, "binary vectors are compared by Hamming distance", images=folder)


def test_pictures_without_a_direction_are_left_out_with_their_number(
    lance: VectorStore, model: Model, tmp_path: Path
) -> None:
    vectors = pictures(model.width)
    vectors[3], vectors[7] = 0, np.nan
    plan, filled = run(lance, None, images=write_pictures(tmp_path / "vectors", model, names(), vectors))
    assert (plan.images, plan.bad_images, filled.images.inserted) == (18, 2, 18)


def test_several_files_and_a_uid_twice(lance: VectorStore, model: Model, tmp_path: Path) -> None:
    vectors = pictures(model.width)
    write_pictures(tmp_path / "vectors", model, names(), vectors)
    folder = write_pictures(tmp_path / "vectors", model, ["b", "c"], vectors[:2])
    assert run(lance, None, images=folder)[1].images == Upserted(22, 0)
    write_pictures(tmp_path / "vectors", model, ["d", "a/4.jpg"], vectors[:2])
    refused(lance, None, r"1 uids come twice: a/4\.jpg", images=folder)


# -- a table that exists --


def make_table(store: VectorStore, model: Model, prompt: str = "document", uids: str = "t") -> list[str]:
    """A table of text vectors as another program makes it: nothing is recorded. Of any length, as not all programs scale them."""
    vectors = model.encode_text(WORDS, kind=prompt)  # type: ignore[call-overload]
    store.apply_changes(model.width)
    given = [f"{uids}{n}" for n in range(len(WORDS))]
    items = make_items("text", given, vectors, text=pa.array(WORDS))
    store.upsert(items)
    return given


def test_pictures_join_texts_and_no_text_vector_changes(store: VectorStore, model: Model, tmp_path: Path) -> None:
    uids = make_table(store, model)
    before = store.read(uids).sort_by("uid")
    folder = write_pictures(tmp_path / "vectors", model, names(), pictures(model.width))
    plan, filled = run(store, model, images=folder)
    assert plan.agreement is not None
    assert plan.agreement.median > 0.9999
    assert plan.agreement.texts == len(WORDS)
    assert filled.rows == {"image": 20, "text": len(WORDS)}
    after = store.read(uids).sort_by("uid")
    assert after.equals(before)
    assert [buffer and buffer.to_pybytes() for buffer in after["vector"].combine_chunks().flatten().buffers()] == [
        buffer and buffer.to_pybytes() for buffer in before["vector"].combine_chunks().flatten().buffers()
    ]


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


def with_prompts(model: Model, query: str, document: str) -> Model:
    spec: ModelSpec = model.spec.model_copy(update={"prompts": {"query": query, "document": document}})
    return replace(model, spec=spec)


def test_a_table_embedded_with_the_prompt_of_queries_is_taken_and_said_to_be_so(
    lance: VectorStore, model: Model, tmp_path: Path
) -> None:
    two = with_prompts(model, "search query about: ", "this is a document, and its words are: ")
    make_table(lance, two, prompt="query")
    folder = write_pictures(tmp_path / "vectors", two, names(), pictures(model.width))
    file = write_texts(tmp_path / "new.jsonl", [{"uid": "new", "text": "a green bus"}])
    plan, _ = run(lance, two, images=folder, texts=file)
    assert plan.agreement is not None
    assert plan.agreement.prompt == "query"
    expected = two.encode_text("a green bus", kind="query")
    assert np.allclose(lance.read(["new"])["vector"].to_pylist()[0], expected, atol=1e-5)


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


def test_texts_of_a_parquet_file(lance: VectorStore, model: Model, tmp_path: Path) -> None:
    table = pa.table({"uid": pa.array([1, 2, 3]), "text": ["a dog", None, "a cat"], "more": [0, 0, 0]})
    pq.write_table(table, tmp_path / "texts.parquet")
    plan, _ = run(lance, model, texts=str(tmp_path / "texts.parquet"))
    assert (plan.texts, plan.empty_texts) == (2, 1)
    assert lance.read(["1", "3"]).num_rows == 2
    pq.write_table(table.drop_columns("text"), tmp_path / "wrong.parquet")
    refused(lance, model, r"has no column text\. Its columns are uid, more", texts=str(tmp_path / "wrong.parquet"))


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


# -- the command --


def test_the_command(checkpoint: str, model: Model, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "vectors", model, names(), pictures(model.width), source=["x"] * 20)
    file = write_texts(tmp_path / "texts.jsonl", [{"uid": "a", "text": "a dog"}, {"uid": "b", "text": None}])
    arguments = [
        "index",
        "--model",
        checkpoint,
        "--images",
        folder,
        "--texts",
        file,
        "--index",
        str(tmp_path / "index"),
    ]
    runner = CliRunner()
    dry = runner.invoke(app, [*arguments, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "nothing was written" in dry.output
    assert not (tmp_path / "index").exists()
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for line in (
        "pictures   20 to write",
        "1 to embed, 1 left out without words",
        "20 new",
        "full scan of 21 rows",
        "BM25",
    ):
        assert line in result.output
    assert len(open_index(str(tmp_path / "index")).search(model.encode_text("a dog"), top=50)) == 21
    again = runner.invoke(app, ["index", "--images", folder, "--index", str(tmp_path / "index"), "--device", "nix"])
    assert again.exit_code == 0, "no model is needed where the encoder is recorded"
    assert "0 new, 20 there before" in again.output
    bad = runner.invoke(app, ["index", "--images", str(tmp_path / "none"), "--index", str(tmp_path / "index")])
    assert bad.exit_code == 2
    assert "error: " in bad.stderr
