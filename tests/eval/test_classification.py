"""Zero-shot beyond accuracy: against scikit-learn, CLIP_benchmark, and cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, f1_score

from nev.eval.metrics import classification
from nev.eval.metrics.classification import calibration_error, confusions, fit_scale, rank_answers
from nev.eval.metrics.retrieval import retrieval
from nev.eval.metrics.zeroshot import zero_shot, zero_shot_ranks


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    rows = rng.standard_normal(shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def made(seed: int, images: int = 200, classes: int = 12, width: int = 16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images that lie near their classes, some of which have no image."""
    rng = np.random.default_rng(seed)
    names = unit(rng, classes, width)
    labels = rng.integers(0, classes - 1, images)
    pictures = names[labels] + 0.35 * rng.standard_normal((images, width))
    return (pictures / np.linalg.norm(pictures, axis=1, keepdims=True)).astype(np.float32), labels, names


@given(st.integers(0, 2**32 - 1))
def test_equal_to_scikit_learn(seed: int) -> None:
    images, labels, classes = made(seed)
    found = rank_answers(zero_shot_ranks(images, labels, classes), images, labels, classes)
    whole, given_ = np.ones(len(labels)), (images @ classes.T).argmax(1)
    assert classification.mean_per_class(found)(whole) == pytest.approx(
        balanced_accuracy_score(labels, given_), abs=1e-12
    )
    there = np.unique(labels)
    expected = f1_score(labels, given_, labels=there, average="macro", zero_division=0)
    assert classification.macro_f1(found)(whole) == pytest.approx(expected, abs=1e-12)


def test_weights_are_repetitions() -> None:
    images, labels, classes = made(1)
    drawn = np.random.default_rng(0).integers(0, len(labels), len(labels))
    weights = np.bincount(drawn, minlength=len(labels)).astype(float)
    groups = labels % 3
    one = rank_answers(zero_shot_ranks(images, labels, classes), images, labels, classes)
    many = rank_answers(zero_shot_ranks(images[drawn], labels[drawn], classes), images[drawn], labels[drawn], classes)
    for metric in (
        lambda found, rows: classification.top_k(found, 1),
        lambda found, rows: classification.mean_per_class(found),
        lambda found, rows: classification.macro_f1(found),
        lambda found, rows: classification.worst_group(found, groups[rows], 1),
    ):
        all_rows = np.arange(len(labels))
        assert metric(one, all_rows)(weights) == pytest.approx(metric(many, drawn)(np.ones(len(labels))), abs=1e-12)


def test_the_worst_group_by_hand() -> None:
    ranks, labels = np.array([0, 1, 0, 0, 6]), np.zeros(5, np.int64)
    found = classification.Answers(ranks, labels, labels, 7)
    groups = np.array([2, 2, 0, 0, -1])  # group 1 has no image, and the last image has no group
    assert classification.worst_group(found, groups, 1)(np.ones(5)) == 0.5
    assert classification.worst_group(found, groups, 5)(np.ones(5)) == 1.0


def test_calibration_by_hand() -> None:
    classes = np.eye(2, dtype=np.float32)
    images = np.array([[1, 0], [1, 0], [0, 1], [1, 0]], np.float32)
    labels = np.array([0, 0, 1, 1])
    confidence = 1 / (1 + np.exp(-3))  # of each: the cosines are 1 and 0
    assert calibration_error(images, labels, classes, 3.0) == pytest.approx(abs(0.75 - confidence), abs=1e-6)
    # Under the scale at which three of four are as sure as they are right, nothing is left of it.
    scale = fit_scale(images, labels, classes)
    assert scale == pytest.approx(np.log(3), rel=1e-3)
    assert calibration_error(images, labels, classes, scale) < 1e-3


def test_the_fitted_scale_is_the_likeliest() -> None:
    images, labels, classes = made(2)
    logits, right = torch.tensor(images @ classes.T).double(), torch.tensor(labels)

    def surprise(scale: float) -> float:
        return float(torch.nn.functional.cross_entropy(scale * logits, right))

    best = fit_scale(images, labels, classes)
    assert 1 < best < 1000
    assert all(surprise(best) <= surprise(best * factor) for factor in (0.9, 0.99, 1.01, 1.1))


def test_what_is_mixed_up_most() -> None:
    labels, given_ = np.array([0, 0, 0, 1, 1, 2]), np.array([1, 1, 0, 1, 0, 2])
    found = classification.Answers((labels != given_).astype(np.int64), given_, labels, 4)
    assert confusions(found, 5) == [(0, 1, 2 / 3), (1, 0, 1 / 2)]
    assert np.array_equal(classification.per_class(found), [1 / 3, 1 / 2, 1, np.nan], equal_nan=True)


class Fixed:
    """A model of CLIP_benchmark's kind, whose images and texts are their vectors already."""

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def encode_text(self, texts: torch.Tensor) -> torch.Tensor:
        return texts


@pytest.mark.parametrize("seed", range(5))
def test_zero_shot_equals_clip_benchmark(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pytest.importorskip(
        "clip_benchmark.metrics.zeroshot_classification", reason="clip-benchmark is not installed"
    )
    monkeypatch.setattr(theirs, "float", lambda array: array.item(), raising=False)  # numpy 2.4 refuses what it does
    images, labels, classes = made(seed)
    batches = [(torch.tensor(images[at : at + 64]), torch.tensor(labels[at : at + 64])) for at in range(0, 200, 64)]
    logits, target = theirs.run_classification(Fixed(), torch.tensor(classes.T), batches, "cpu", amp=False)
    top1, top5 = theirs.accuracy(logits, target, topk=(1, 5))
    ours = zero_shot(images, labels, classes)
    assert ours["zero_shot/top1"] == pytest.approx(top1, abs=1e-6)
    assert ours["zero_shot/top5"] == pytest.approx(top5, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_retrieval_equals_clip_benchmark(seed: int) -> None:
    """With one to five captions an image; its loader gives a batch's images, and a list of captions for each."""
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval", reason="clip-benchmark is not installed")
    rng = np.random.default_rng(seed)
    images = unit(rng, 60, 8)
    owner = np.repeat(np.arange(60), rng.integers(1, 6, 60))
    texts = images[owner] + 0.5 * rng.standard_normal((len(owner), 8))
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)
    batches = [
        (
            torch.tensor(images[at : at + 16]),
            [list(np.flatnonzero(owner == row)) for row in range(at, min(at + 16, 60))],
        )
        for at in range(0, 60, 16)
    ]
    found = theirs.evaluate(
        Fixed(), batches, lambda rows: torch.tensor(texts[rows]), "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    ours = retrieval(images, texts, owner)
    for k in (1, 5, 10):
        assert ours[f"retrieval/text_to_image/r{k}"] == pytest.approx(found[f"image_retrieval_recall@{k}"], abs=1e-6)
        assert ours[f"retrieval/image_to_text/r{k}"] == pytest.approx(found[f"text_retrieval_recall@{k}"], abs=1e-6)
