"""`nev index`: into a new table and into one that exists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.fill import WORDS, everything, make_table, names, pictures, refused, run, with_prompts, write_texts
from helpers.search import write_pictures
from typer.testing import CliRunner

from nev.commands.main import app
from nev.inference.model import Model
from nev.search.index import open_index
from nev.search.store import Upserted, VectorStore


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


def test_texts_of_a_parquet_file(lance: VectorStore, model: Model, tmp_path: Path) -> None:
    table = pa.table({"uid": pa.array([1, 2, 3]), "text": ["a dog", None, "a cat"], "more": [0, 0, 0]})
    pq.write_table(table, tmp_path / "texts.parquet")
    plan, _ = run(lance, model, texts=str(tmp_path / "texts.parquet"))
    assert (plan.texts, plan.empty_texts) == (2, 1)
    assert lance.read(["1", "3"]).num_rows == 2
    pq.write_table(table.drop_columns("text"), tmp_path / "wrong.parquet")
    refused(lance, model, r"has no column text\. Its columns are uid, more", texts=str(tmp_path / "wrong.parquet"))


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
