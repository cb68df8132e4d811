"""A run's validation is a suite: the metrics' own numbers under MLflow's names, one page, captions read once."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.training import prepare_job, run_bare, train_reader
from rich.console import Console

from nev.config.experiment import Experiment
from nev.embed.embedder import Embedder
from nev.eval.evaluate import report_validation
from nev.eval.metrics.mixed_retrieval import mixed_retrieval
from nev.eval.metrics.ranks import Floats
from nev.eval.metrics.retrieval import retrieval
from nev.eval.metrics.zeroshot import zero_shot
from nev.eval.suite.results import SuiteResult
from nev.eval.suite.vectors import Embedded, Texts
from nev.eval.validation import texts as validation_texts
from nev.eval.validation.scoring import list_metric_names, score_validation
from nev.eval.validation.task import Validation, make_suite, make_validation, metric_names
from nev.eval.validation.validate import validate
from nev.eval.validation.vectors import load_texts, load_vectors
from nev.models.text import TextTower, load_text
from nev.runs.manifest import latest_checkpoint, read_manifest
from nev.storage.reading import DataError

Make = Callable[..., Experiment]
D = 384


def unit(rows: int, seed: int = 0) -> Floats:
    vectors = np.random.default_rng(seed).normal(size=(rows, D)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def embed(images: np.ndarray) -> Floats:
    return unit(len(images))


def encode(sentences: Sequence[str]) -> Floats:
    return unit(len(sentences), seed=1)


@pytest.fixture
def captions_read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the caption column of each shard was read."""
    reads: Counter[str] = Counter()
    read_column = validation_texts.read_column

    def counting(location: str, column: str, *rest: str) -> object:
        reads[location] += column == "caption"
        return read_column(location, column, *rest)

    monkeypatch.setattr(validation_texts, "read_column", counting)
    return reads


@pytest.fixture
def online(tiny: Make, text: TextTower) -> Validation:
    return make_validation(tiny(lock="none"), text)


@pytest.mark.parametrize("lockstep", [False, True])
def test_a_validation_reads_captions_once(online: Validation, captions_read: Counter[str], lockstep: bool) -> None:
    result = validate(online, embed, 10.0, encode, lockstep=lockstep)
    assert result
    assert result.texts.captions is not None
    index = online.reader.index
    assert captions_read == {index.location(shard): 1 for shard in range(len(index.paths))}


def test_vectors_of_sidecars_need_no_captions(tiny: Make, text: TextTower, captions_read: Counter[str]) -> None:
    assert validate(make_validation(tiny(), text), embed, 10.0)
    assert captions_read.total() == 0


def test_metrics_are_the_functions_own(online: Validation) -> None:
    """Under the names that MLflow has had, with one row that cannot be decoded and one without a label."""
    assert online.classes
    rows, classes = online.reader.index.total_rows, len(online.classes.names)
    valid, labels = np.arange(rows) != 3, np.arange(rows) % classes
    labels[5] = -1
    images, texts = unit(rows), Texts(unit(classes, 2), unit(2 * rows, 3), np.repeat(np.arange(rows), 2))
    metrics = score_validation(online, Embedded(images, valid, labels), texts, 10.0, complete=True)
    labelled = valid & (labels >= 0)
    assert texts.captions is not None
    own = np.repeat(valid, 2)
    pairs = images[valid], texts.captions[own], np.repeat(np.arange(rows - 1), 2)
    expected = {
        **{"val/rows": rows, "val/bad_rows": 1, "zero_shot/scale": 10.0},
        **zero_shot(images[labelled], labels[labelled], unit(classes, 2)),
        **retrieval(*pairs),
        **mixed_retrieval(*pairs),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert {"space/anisotropy_images", "space/gap", "space/overlap", "texts/own_r10"} <= metrics.keys()
    shares = [name.removesuffix("_low") for name in metrics if name.endswith("_low")]
    assert set(shares) == set(metric_names(classes, True))
    assert all(metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"] for name in shares)
    assert metrics.keys() == list_metric_names(classes, 2)


@pytest.mark.slow
def test_what_training_measures_is_what_an_evaluation_measures(tiny: Make, text: TextTower, tmp_path: Path) -> None:
    """The page and the JSON of a checkpoint come from its own vectors: no picture is embedded."""
    job = prepare_job(tiny(train__steps=2), text)
    run_bare(job, train_reader(job.config, text))
    newest = latest_checkpoint(job.run)
    assert newest
    assert job.validation
    embedder = Embedder(newest, read_manifest(newest), job.config, text)
    report = report_validation(job.validation, embedder, tmp_path, Console(quiet=True))
    trained = read_manifest(newest)["metrics"]
    assert {name: report.metrics[name] for name in trained} == trained
    assert report.metrics.keys() - trained.keys() >= {"space/gap", "mixed/images_found", "zero_shot/scale_fitted"}
    page, numbers = report.files
    assert [file.name for file in report.files] == ["validation-00000002.html", "validation-00000002.json"]
    assert SuiteResult.model_validate_json(numbers.read_text()) == report.result
    assert {task.name: task.value for task in report.result.tasks} == {
        "zero_shot": trained["zero_shot/top1"],
        "retrieval": trained["retrieval/mean_recall_1"],
        "space": report.metrics["space/overlap"],
    }
    assert page.read_text().count("data:image/png;base64,") == 9  # the loss, and the pictures of three tasks
    assert {"retrieval-search", "zero_shot-classes"} <= report.pictures.keys()


@pytest.mark.slow
def test_labels_that_were_corrected_since_the_training_are_scored(tiny: Make, text: TextTower, tmp_path: Path) -> None:
    val = tmp_path / "val"
    shutil.copytree(tiny().data.val or "", val)
    job = prepare_job(tiny(data__val=str(val), eval__retrieval=False, train__steps=2), text)
    run_bare(job, train_reader(job.config, text))
    newest = latest_checkpoint(job.run)
    assert newest
    assert job.validation
    (shard,) = val.glob("*.parquet")
    table = pq.read_table(shard)
    column = table.schema.get_field_index("label")
    labels = pa.array(np.roll(table["label"].to_numpy(), 1), table.schema.field(column).type)
    pq.write_table(table.set_column(column, table.schema.field(column), labels), shard, row_group_size=32)
    vectors = load_vectors(newest, job.validation)
    assert vectors
    assert vectors[0].labels.tolist() == labels.to_pylist()


@pytest.mark.slow
def test_a_report_reads_captions_once(
    tiny: Make,
    small_text: dict[str, object],
    tmp_path: Path,
    captions_read: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny(train__steps=1, lock="none", train__micro_batch=32, **small_text)
    text = load_text(config.text)
    job = prepare_job(config, text)
    run_bare(job, train_reader(job.config, text))
    newest = latest_checkpoint(job.run)
    assert newest
    assert job.validation
    embedded, _ = load_vectors(newest, job.validation) or pytest.fail("no vectors")
    captions_read.clear()
    monkeypatch.setattr("nev.eval.validation.on_cluster.embed_set", lambda *_: embedded)
    monkeypatch.setattr("nev.cluster.session.connect", lambda: None)
    overrides = ["eval.batch=8"]
    embedder = Embedder.from_checkpoint(newest, overrides)
    report = report_validation(job.validation, embedder, tmp_path, Console(quiet=True), overrides)
    assert re.fullmatch(r"validation-[0-9a-f]{8}-00000001\.html", report.files[0].name), "the run's own page stays"
    assert set(captions_read.values()) == {1}
    trained = read_manifest(newest)["metrics"]
    shared = trained.keys() & report.metrics.keys()
    assert trained.keys() - shared == {"space/text_drift"}
    assert {name: report.metrics[name] for name in shared} == pytest.approx({name: trained[name] for name in shared})


def test_a_set_that_cannot_be_scored_is_named(online: Validation) -> None:
    rows = online.reader.index.total_rows
    texts = load_texts(online, encode)
    unlabelled = Embedded(unit(rows), np.ones(rows, bool), np.full(rows, -1))
    with pytest.raises(
        DataError, match=r"val: no row has a label and a picture that can be decoded, so there is nothing"
    ):
        score_validation(online, unlabelled, texts, 1.0)
    with pytest.raises(DataError, match=rf"val: no picture of {rows} can be decoded, so there is nothing to score"):
        score_validation(online, unlabelled._replace(valid=np.zeros(rows, bool)), texts, 1.0)
    neither = dataclasses.replace(online, classes=None, retrieval=False)
    assert set(score_validation(neither, unlabelled, Texts(), 1.0)) == {
        "val/rows",
        "val/bad_rows",
        "space/anisotropy_images",
    }


def test_the_suite_of_a_validation(online: Validation) -> None:
    suite = make_suite(online)
    assert {task.name: task.judged_by for task in suite.tasks} == {
        "zero_shot": "top1",
        "retrieval": "mean_recall_1",
        "space": "overlap",
    }
    assert len({task.source for task in suite.tasks}) == 1
    again = type(suite).model_validate(json.loads(suite.model_dump_json()))
    assert again == suite
