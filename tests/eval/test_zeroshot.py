"""Zero-shot accuracy: toy cases by hand, brute force, ties, tiles, bad input."""

import sys
import tracemalloc
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from helpers.fresh import run_in_fresh_process
from hypothesis import given, settings
from hypothesis import strategies as st

from nev.config.base import ConfigError
from nev.config.eval import Eval, ZeroShot
from nev.config.file import parse
from nev.eval.metrics import ranks
from nev.eval.metrics.classification import rank_answers
from nev.eval.metrics.ranks import Floats
from nev.eval.metrics.zeroshot import class_embeddings, zero_shot, zero_shot_ranks
from nev.eval.validation.task import class_names, class_sentences
from nev.models.text import TextTower


def unit(rows) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float64)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def grid(n: int, dim: int, seed: int) -> np.ndarray:
    """Unit vectors along small integer ones, of which many coincide: ties are common and never near misses."""
    rows = np.random.default_rng(seed).integers(-1, 2, (n, dim))
    rows[:, 0] += 2 * (rows == 0).all(1)
    return unit(rows)


def test_by_hand() -> None:
    classes = unit([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    images = unit([[3, 2, 1], [3, 2, 1], [3, 2, 1], [1, 2, 3]])
    got = zero_shot(images, np.array([0, 1, 2, 2]), classes, ks=(1, 2, 3, 5))
    assert got == {"zero_shot/top1": 0.5, "zero_shot/top2": 0.75, "zero_shot/chance": 1 / 3}


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 30),
    c=st.integers(2, 12),
    dim=st.integers(1, 4),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_equals_brute_force_at_any_chunk(n: int, c: int, dim: int, chunk: int, seed: int) -> None:
    images, classes = grid(n, dim, seed), grid(c, dim, seed + 1)
    labels = np.random.default_rng(seed).integers(0, c, n)
    got = zero_shot(images, labels, classes, ks=(1, 3), chunk=chunk)
    for k in (1, 3):
        hits = 0
        for image, label in zip(images.astype(np.float64), labels, strict=True):
            score = [float(image @ row) for row in classes.astype(np.float64)]
            hits += sum(other >= score[label] - 1e-5 for j, other in enumerate(score) if j != label) < k
        assert (f"zero_shot/top{k}" in got) == (k < c)
        if k < c:
            assert got[f"zero_shot/top{k}"] == pytest.approx(hits / n)


def test_agrees_with_argmax_where_nothing_ties() -> None:
    rng = np.random.default_rng(0)
    images, classes = unit(rng.normal(size=(2000, 64))), unit(rng.normal(size=(50, 64)))
    labels = rng.integers(0, 50, 2000)
    got = zero_shot(images, labels, classes)
    order = np.argsort(-(images.astype(np.float64) @ classes.T.astype(np.float64)), axis=1)
    assert got["zero_shot/top1"] == np.mean(order[:, 0] == labels)
    assert got["zero_shot/top5"] == np.mean((order[:, :5] == labels[:, None]).any(1))


@pytest.mark.parametrize("dim", [3, 384, 768])
def test_collapsed_embeddings_score_nothing(dim: int) -> None:
    one = unit(np.random.default_rng(1).normal(size=(1, dim)))
    labels = np.arange(300) % 10
    got = zero_shot(np.repeat(one, 300, 0), labels, np.repeat(one, 10, 0), chunk=7)
    assert got == {"zero_shot/top1": 0, "zero_shot/top5": 0, "zero_shot/chance": 0.1}
    # One image vector for all, over distinct classes: right for the one class that it is nearest to, as chance is.
    distinct = unit(np.random.default_rng(2).normal(size=(10, dim)))
    assert zero_shot(np.repeat(one, 300, 0), labels, distinct)["zero_shot/top1"] == pytest.approx(0.1)


def test_scores_are_held_one_tile_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    original = ranks.scores
    monkeypatch.setattr(ranks, "scores", lambda a, b: shapes.append((len(a), len(b))) or original(a, b))
    zero_shot(grid(100, 3, 0), np.zeros(100, int), grid(30, 3, 1), chunk=16)
    assert max(rows * columns for rows, columns in shapes) == 16 * 16
    assert sum(rows * columns for rows, columns in shapes) == 100 * 30


@pytest.mark.slow
def test_memory_stays_below_a_score_matrix() -> None:
    assert run_in_fresh_process(peak_bytes_of_zero_shot, 6000) < 6000 * 6000 * 4 / 20


def peak_bytes_of_zero_shot(count: int) -> int:
    """As many pictures as classes are scored."""
    images, classes = grid(count, 4, 0), grid(count, 4, 1)
    tracemalloc.start()
    zero_shot(images, np.arange(count), classes, chunk=512)
    return tracemalloc.get_traced_memory()[1]


def test_bad_input_is_named() -> None:
    images, classes, labels = grid(4, 3, 0), grid(3, 3, 1), np.array([0, 1, 2, 0])
    broken = images.copy()
    broken[2, 1] = np.nan
    cases = [
        ((images, np.array([0, 1, -1, 0]), classes), r"labels: 1 of 4 are outside 0\.\.2 .* -1 at row 2"),
        ((images, np.array([0, 3, 1, 0]), classes), "3 at row 1"),
        ((images, labels[:3], classes), "4 integers"),
        ((images, labels.astype(float), classes), "4 integers"),
        ((broken, labels, classes), "images: 1 of 4 rows hold NaN or infinity, the first is row 2"),
        ((images, labels, classes * 2), "classes: 3 of 3 rows are not of unit length"),
        ((images, labels, np.zeros_like(classes)), "unit length"),
        ((images, labels, classes[:, 0]), "shape"),
        ((images[:0], labels[:0], classes), "shape"),
        ((images, labels, unit(np.ones((3, 2)))), "3 wide and classes 2"),
        ((images, labels * 0, classes[:1]), "two classes"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            zero_shot(*arguments)
    with pytest.raises(ValueError, match="chunk"):
        zero_shot(images, labels, classes, chunk=0)


def test_class_is_the_unit_mean_of_its_unit_templates() -> None:
    vectors = {"a {x}": [2, 0, 0], "the {x}": [0, 5, 0], "a fox": [0, 0, 3], "the fox": [0, 0, 1]}
    asked = []

    def encode(sentences: Sequence[str]) -> np.ndarray:
        asked.extend(sentences)
        return np.array([vectors[sentence] for sentence in sentences], dtype=np.float16)

    got = class_embeddings(encode, ["{x}", "fox"], ["a {}", "the {}"])
    assert asked == ["a {x}", "the {x}", "a fox", "the fox"]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]], atol=1e-7)


def test_of_classes_of_one_name_the_first_one_wins() -> None:
    """ImageNet has `missile` and `sunglasses` twice; open_clip and CLIP_benchmark take the argmax."""
    names = ["missile", "crane", "missile", "cat", "missile"]
    spoken = {"missile": [1, 0, 0], "crane": [0, 1, 0], "cat": [0.8, 0, 0.6]}
    calls = []

    def encode(sentences: Sequence[str]) -> np.ndarray:
        calls.append(list(sentences))
        return np.array([spoken[sentence] for sentence in sentences])

    classes = class_embeddings(encode, names, ["{}"])
    assert calls == [["missile", "crane", "cat"]]
    images = unit(np.array([[1.0, 0.1, 0], [0.9, 0, 0.5], [0.1, 1, 0]]))
    pairs = [(image, label) for image in range(3) for label in range(5)]
    rows, labels = (np.array(side) for side in zip(*pairs, strict=True))
    ranks = zero_shot_ranks(images[rows], labels, classes, names=names).reshape(3, 5)
    assert ranks.tolist() == [[0, 4, 1, 3, 2], [1, 4, 2, 0, 3], [1, 0, 2, 4, 3]]
    answers = rank_answers(ranks[:, 0], images, np.zeros(3, np.int64), classes, names)
    assert answers.predicted.tolist() == [0, 3, 1]
    # Classes that tie for another reason still count against the model.
    assert zero_shot_ranks(images[:1], [0], classes, names=list("abcde")).tolist() == [2]


def test_bad_class_embeddings_are_named() -> None:
    def gives(value: float, rows: int = 2):
        return lambda sentences: np.full((rows, 3), value)

    for encode, classes, templates, message in [
        (gives(1), [], ["a {}"], "at least one class"),
        (gives(1), ["cat", "dog"], [], "one template"),
        (gives(1), ["cat", "dog"], ["a photo"], "exactly one"),
        (gives(1, rows=3), ["cat", "dog"], ["a {}"], "2 sentences"),
        (gives(np.nan), ["cat", "dog"], ["a {}"], "not finite; the first is 'a cat'"),
        (gives(0), ["cat", "dog"], ["a {}"], "zero"),
        (lambda sentences: np.array([[1.0, 0], [-1.0, 0]]), ["cat"], ["a {}", "no {}"], "zero .* 'cat'"),
    ]:
        with pytest.raises(ValueError, match=message):
            class_embeddings(encode, classes, templates)


def test_imagenet_is_a_word_of_the_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Names and templates come from open_clip, or from what stands in its place."""
    evaluation = parse(Eval, {"zero_shot": "imagenet"})
    assert evaluation.zero_shot == ZeroShot(classes="imagenet", templates="imagenet")
    metadata = ModuleType("open_clip.zero_shot_metadata")
    metadata.IMAGENET_CLASSNAMES = ["tench", "missile", "missile"]  # type: ignore[attr-defined]
    metadata.OPENAI_IMAGENET_TEMPLATES = [lambda name: f"a bad photo of a {name}.", lambda name: f"a {name}."]  # type: ignore[attr-defined]
    package = ModuleType("open_clip")
    package.__spec__ = ModuleSpec("open_clip", None)
    package.zero_shot_metadata = metadata  # type: ignore[attr-defined]
    for name, module in (("open_clip", package), ("open_clip.zero_shot_metadata", metadata)):
        monkeypatch.setitem(sys.modules, name, module)
    classes = class_sentences(evaluation.zero_shot, None)
    assert classes == (("tench", "missile", "missile"), ("a bad photo of a {}.", "a {}."), None)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match=r"come from open_clip: pip install 'nev\[eval\]'"):
        class_sentences(evaluation.zero_shot, None)
    with pytest.raises(ConfigError, match="no such file: imagenets"):
        class_sentences(ZeroShot(classes="imagenets"), None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\n\ndog\n", r"classes\.txt: line 2 is blank"),
        (b"\n \n", r"classes\.txt is empty; it needs one class name a line"),
        (b"caf\xe9\n", r"classes\.txt is not text in UTF-8"),
        (None, r"eval\.zero_shot\.classes: no such file: .*classes\.txt"),
    ],
)
def test_a_file_of_class_names_that_would_shift_the_labels(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "classes.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        class_names(ZeroShot(classes=str(file), templates=("a {}",)))


def test_a_file_of_class_names_is_read_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes("\ufeffcat\r\n polar bear \r\n\n".encode())
    found = class_names(ZeroShot(classes=str(tmp_path / "classes.txt"), templates=("a {}",)))
    assert found == ["cat", "polar bear"]


def test_class_prompts_are_embedded_once_on_a_machine(
    text: TextTower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    def encode(self: TextTower, sentences: Sequence[str]) -> Floats:
        asked.append(len(sentences))
        return np.eye(len(sentences), 384, dtype=np.float32)

    monkeypatch.setattr(TextTower, "encode", encode)
    classes = ZeroShot(classes=("cat", "dog"), templates=("a {}", "the {}"))
    first, again = class_sentences(classes, text), class_sentences(classes, text)
    assert first
    assert again
    assert np.array_equal(first.vectors, again.vectors)
    assert asked == [4]
    class_sentences(classes.model_copy(update={"templates": ("a {}", "one {}")}), text)
    assert asked == [4, 4]
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("NEV_CACHE", str(tmp_path / "file"))
    found = class_sentences(classes, text)
    assert found
    assert np.array_equal(found.vectors, first.vectors)
    assert "not cached" in caplog.text
