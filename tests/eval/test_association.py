"""WinoGAViL: a word, pictures to choose from, Jaccard's index of what is chosen and what belongs to it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.pictures import encoded, photo
from sklearn.metrics import jaccard_score

from nev.config.base import ConfigError
from nev.config.data import Limits
from nev.eval.suite.association import jaccard
from nev.eval.suite.collection import Collection, Fact
from nev.eval.suite.reading import blocks, make_reading
from nev.eval.suite.schema import Task
from nev.eval.suite.vectors import Embedded

TASK = Task.model_validate(
    {"name": "w", "kind": "association", "source": {"format": "winogavil", "input": "wino"}, "prompt": "A {}"}
)


def collection(vectors: dict[str, list[float]], bad: str = "") -> Collection:
    facts = [Fact(uid=name, captions=(), name=None, extra={}, reason="") for name in vectors]
    valid = np.array([name != bad for name in vectors])
    return Collection(
        Embedded(np.array(list(vectors.values()), np.float32), valid, np.full(len(vectors), -1)), facts, {}
    )


def write(root: Path, instances: list[dict[str, object]]) -> None:
    (root / "wino").mkdir(exist_ok=True)
    (root / "wino/test.jsonl").write_text("".join(json.dumps(one) + "\n" for one in instances))


def test_by_hand_and_by_scikit_learn(tmp_path: Path) -> None:
    names = [f"p{at}" for at in range(12)]
    angles = np.linspace(0, 1.5, 12)
    found = collection({name: [np.cos(a), np.sin(a)] for name, a in zip(names, angles, strict=True)})
    hard = {"cue": "Apple", "candidates": names, "associations": ["p0", "p1", "p7"]}
    easy = {"cue": "dog", "candidates": names[:5], "associations": ["p0"]}
    write(tmp_path, [hard, easy])
    asked: list[str] = []

    def encode(sentences: list[str]) -> np.ndarray:
        asked.extend(sentences)
        return np.tile(np.array([1, 0], np.float32), (len(sentences), 1))

    metrics, sure = jaccard(TASK, found, encode, str(tmp_path))
    assert asked == ["An apple", "A dog"]
    chosen = np.isin(names, ["p0", "p1", "p2"])  # the three that lie nearest
    expected = jaccard_score(np.isin(names, ["p0", "p1", "p7"]), chosen)
    assert metrics == {
        "jaccard": pytest.approx(expected),
        "jaccard_all": pytest.approx((expected + 1) / 2),
        "left_out": 0,
    }
    assert sure["jaccard"].low == pytest.approx(expected)


def test_an_instance_with_a_picture_that_is_bad_is_left_out(tmp_path: Path) -> None:
    found = collection({"a": [1, 0], "b": [0, 1], "c": [0, 1]}, bad="c")
    good = {"cue": "x", "candidates": ["a", "b"], "associations": ["a"]}
    write(tmp_path, [good, {"cue": "x", "candidates": ["a", "c"], "associations": ["a"]}])
    metrics, _ = jaccard(TASK, found, lambda sentences: np.array([[1, 0]] * len(sentences), np.float32), str(tmp_path))
    assert metrics == {"jaccard": 1, "jaccard_all": 1, "left_out": 1}
    write(tmp_path, [{"cue": "x", "candidates": ["a", "nowhere"], "associations": ["a"]}])
    with pytest.raises(ConfigError, match="no instance has all of its pictures"):
        jaccard(TASK, found, lambda sentences: np.zeros((1, 2), np.float32), str(tmp_path))


@pytest.mark.parametrize("line", ["{", '{"cue": "x"}', '{"cue": "", "candidates": ["a", "b"], "associations": ["a"]}'])
def test_a_line_that_is_no_instance_is_named(tmp_path: Path, line: str) -> None:
    write(tmp_path, [{"cue": "x", "candidates": ["a", "b"], "associations": ["a"]}])
    with (tmp_path / "wino/test.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(ConfigError, match=r"test\.jsonl:2: not an instance"):
        jaccard(TASK, collection({"a": [1, 0]}), lambda sentences: np.zeros((1, 2)), str(tmp_path))


def test_its_pictures_are_read(tmp_path: Path) -> None:
    (tmp_path / "wino/images").mkdir(parents=True)
    for name in ("ant", "bee"):
        (tmp_path / f"wino/images/{name}.jpg").write_bytes(encoded(photo(len(name))))
    reading = make_reading(TASK, str(tmp_path), 16, Limits(), 1)
    facts = [
        json.loads(fact)
        for unit in reading.units
        for block in blocks(unit, reading.read, reading.view)
        for fact in block["facts"]
    ]
    assert [fact["uid"] for fact in facts] == ["ant", "bee"]
    with pytest.raises(ConfigError, match=r"no pictures\. The pictures of WinoGAViL belong there"):
        make_reading(TASK, str(tmp_path / "elsewhere"), 16, Limits(), 1)
