"""The linear head of the alignment probe, and its scores."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from helpers.arrays import drawn, unit

from nev.config.base import ConfigError
from nev.embed.features import TOO_LARGE
from nev.eval.alignment_probe import mean_by_owner, score_features
from nev.eval.linear_probe import fit_linear_probe, project
from nev.eval.suite.vectors import Pairs, Texts
from nev.eval.trunk_features import pair_up


def planted(count: int, seed: int, related: bool) -> Pairs:
    """Pictures with two captions each; their features are a noisy linear image of the captions' mean, or unrelated."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(count, 16)).astype(np.float32)
    owner = np.repeat(np.arange(count), 2)
    texts = unit(centres[owner] + 0.1 * rng.normal(size=(2 * count, 16)).astype(np.float32))
    mixing = np.random.default_rng(99).normal(size=(16, 24))
    seen = centres if related else rng.normal(size=centres.shape)
    features = 50 * (seen @ mixing + 0.1 * rng.normal(size=(count, 24))) + 7
    return Pairs(features.astype(np.float32), texts, owner)


def test_a_linear_relation_is_found() -> None:
    result = score_features("a", planted(400, 0, related=True), planted(200, 1, related=True), seed=0)
    assert result.metrics["text_to_image_r10"] > 0.9
    assert result.metrics["image_to_text_r10"] > 0.9
    assert result.metrics["mutual_knn"] > 5 * result.metrics["mutual_knn_chance"]
    assert (result.fitted, result.scored, result.width) == (400, 200, 24)


def test_a_head_depends_on_its_arguments_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nev.eval.linear_probe.STEPS", 20)
    pairs, threads = planted(40, 0, related=True), torch.get_num_threads()
    torch.manual_seed(1)
    first, other = fit_linear_probe(*pairs, seed=0), fit_linear_probe(*pairs, seed=1)
    torch.manual_seed(2)
    again = fit_linear_probe(*pairs, seed=0)
    assert first[1:] == again[1:]
    np.testing.assert_array_equal(project(first.head, pairs.images), project(again.head, pairs.images))
    assert not np.array_equal(project(first.head, pairs.images), project(other.head, pairs.images))
    assert torch.get_num_threads() == threads


def test_unrelated_features_score_as_guessing_does() -> None:
    result = score_features("a", planted(400, 0, related=False), planted(200, 1, related=False), seed=0)
    for way in ("text_to_image_r10", "image_to_text_r10"):
        assert result.metrics[f"{way}_low"] < result.metrics[f"{way}_chance"] < 1.2 * result.metrics[f"{way}_high"]
    assert result.metrics["mutual_knn"] == pytest.approx(result.metrics["mutual_knn_chance"], abs=0.015)


def test_too_few_pictures_are_a_reason() -> None:
    with pytest.raises(ConfigError, match="at least 20 pictures"):
        score_features("a", planted(19, 0, related=True), planted(20, 1, related=True), seed=0)


def test_captions_are_averaged_by_picture() -> None:
    texts = drawn(5, 3, 0)
    means = mean_by_owner(texts, np.array([0, 0, 1, 2, 2]))
    np.testing.assert_allclose(means, [texts[:2].mean(0), texts[2], texts[3:].mean(0)], rtol=1e-5)


def test_bad_rows_are_left_out_and_counted() -> None:
    block = {
        "vector": np.array([[1, 2], [0, 0], [np.inf, 1], [3, 4], [5, 6]], np.float16),
        "valid": np.array([True, False, True, True, True]),
        "reason": np.array(["", "no JPEG", "", "", ""], object),
    }
    texts = Texts(None, unit(drawn(4, 3, 0)), np.array([0, 1, 2, 4]))  # row 3 has no caption
    bad = Counter[str]()
    pairs = pair_up(block, texts, bad)
    assert pairs.images.tolist() == [[1, 2], [5, 6]]
    assert pairs.owner.tolist() == [0, 1]
    assert bad == {"no JPEG": 1, TOO_LARGE: 1, "caption is empty": 1}
