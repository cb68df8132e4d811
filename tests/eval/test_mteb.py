"""A checkpoint as a model of mteb: real task classes, on data that is made here, text alone and image with text (MIEB)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.pictures import photo
from PIL import Image

pytest.importorskip("mteb", reason="mteb is not installed (nev[mteb])")

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification

from nev.config.base import ConfigError
from nev.embed.embedder import Embedder
from nev.eval.evaluate import as_mteb_model
from nev.eval.mteb_model import MtebModel, run_mteb, views
from nev.models.lock import CANARIES
from nev.models.text import TextTower

PAIRS = [
    ("a dog runs over the grass", "a dog is running on a lawn", 5.0),
    ("a man plays the guitar", "somebody makes music", 3.5),
    ("two children at the beach", "a truck on the motorway", 0.2),
    ("the stock market fell", "share prices went down", 4.5),
    ("a cat sleeps", "an aeroplane takes off", 0.1),
]
WHERE = {"path": "made/here", "revision": "1"}


def metadata(name: str, kind: str, score: str, modalities: list[str], category: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        dataset=WHERE,
        description="made in a test",
        type=kind,
        category=category,
        modalities=modalities,
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=score,
        reference=None,
        date=("2026-01-01", "2026-01-02"),
        domains=[],
        task_subtypes=[],
        license="cc0-1.0",
        annotations_creators="derived",
        dialect=[],
        sample_creation="created",
        bibtex_citation="",
    )


class Sts(AbsTaskSTS):
    metadata = metadata("MadeSTS", "STS", "cosine_spearman", ["text"], "t2t")
    min_score, max_score = 0, 5

    def load_data(self, **_: Any) -> None:
        columns = {
            "sentence1": [a for a, _, _ in PAIRS],
            "sentence2": [b for _, b, _ in PAIRS],
            "score": [s for *_, s in PAIRS],
        }
        self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
        self.data_loaded = True


class ZeroShot(AbsTaskZeroShotClassification):
    metadata = metadata("MadeZeroShot", "ZeroShotClassification", "accuracy", ["image", "text"], "i2t")

    def load_data(self, **_: Any) -> None:
        pictures = {"image": [photo(at, 40, 30) for at in range(8)], "label": [at % 2 for at in range(8)]}
        self.dataset = DatasetDict({"test": Dataset.from_dict(pictures)})
        self.data_loaded = True

    def get_candidate_labels(self) -> list[str]:
        return ["an even picture", "an odd picture"]


def model(text: TextTower, sharp: bool = True) -> MtebModel:
    """A model whose picture of a text is that text: photos are told apart by their mean colour."""
    classes = text.encode(["an even picture", "an odd picture"])
    even = {views([photo(at, 40, 30)], 16)[0].tobytes() for at in range(0, 8, 2)}

    def embed(images: np.ndarray) -> np.ndarray:
        return np.stack([classes[int((picture.tobytes() not in even) == sharp)] for picture in images])

    return MtebModel("made", "1", text, embed, 16)


def score(model: MtebModel, task: Any) -> float:
    found = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    return float(found.task_results[0].get_score())


def test_a_text_task_and_an_image_task(text: TextTower) -> None:
    assert score(model(text), Sts()) > 0.8
    assert score(model(text), ZeroShot()) == 1
    assert score(model(text, sharp=False), ZeroShot()) == 0


def test_texts_are_the_towers_own(text: TextTower) -> None:
    sentences = ["a dog", "a cat and a dog"]
    found = model(text).encode([{"text": sentences[:1]}, {"text": sentences[1:]}], task_metadata=Sts.metadata)
    assert found == pytest.approx(text.encode(sentences), abs=1e-6)


def test_nomics_prefixes_are_chosen_by_the_task(text: TextTower) -> None:
    nomic = MtebModel("made", "1", replace(text, prefix="search_query: "), lambda images: images, 16)
    assert nomic._prefix("STS", None) == "classification: "
    assert nomic._prefix("Retrieval", mteb.types.PromptType.query) == "search_query: "
    assert nomic._prefix("Retrieval", mteb.types.PromptType.document) == "search_document: "
    assert model(text)._prefix("STS", None) == ""
    found = nomic.encode([{"text": ["a dog"]}], task_metadata=Sts.metadata)
    assert found == pytest.approx(text.encode(["classification: a dog"]), abs=1e-6)
    assert np.abs(found - text.encode(["a dog"])).max() > 1e-2


def test_a_text_with_an_image_is_their_sum(text: TextTower) -> None:
    one = model(text)
    both = one.encode([{"text": ["a dog"], "image": [photo(0, 40, 30)]}], task_metadata=Sts.metadata)
    assert both == pytest.approx(text.encode(["a dog"]) + text.encode(["an even picture"]), abs=1e-6)
    with pytest.raises(ValueError, match="this batch has"):
        one.encode([{"audio": [b""]}], task_metadata=Sts.metadata)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_pictures_of_any_mode(mode: str) -> None:
    assert views([photo(0, 40, 30).convert(mode), Image.new("RGB", (9, 9))], 16).shape == (2, 16, 16, 3)


@pytest.mark.ray
def test_a_locked_tower_scores_the_same_after_training(trained: str, text: TextTower) -> None:
    before = score(model(text), Sts())
    after = as_mteb_model(Embedder.from_checkpoint(trained))
    assert score(after, Sts()) == before
    assert np.array_equal(after.text.encode(CANARIES), text.encode(CANARIES))
    assert 0 <= score(after, ZeroShot()) <= 1


def test_a_task_that_mteb_does_not_know_and_data_that_cannot_be_had(
    text: TextTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"--mteb: .*NoSuchTask"):
        run_mteb(model(text), ["NoSuchTask"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="the data of STSBenchmark cannot be had"):
        run_mteb(model(text), ["STSBenchmark"])
