"""What a server computes with: torch and ONNX Runtime give the vectors of `nev.load`, whatever is beside an item in a forward."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from helpers.serving import data_url, picture, read_vectors
from hypothesis import given
from hypothesis import strategies as st

from nev.config.model_spec import ModelError
from nev.inference.model import Model
from nev.inference.pictures import read_square
from nev.models.text import BATCH_TOKENS
from nev.serve.app import make_app
from nev.serve.engine import Engine, Sentence
from nev.serve.open_engine import open_engine
from nev.serve.texts import FREE_PADDING, group_by_length
from nev.serve.torch_engine import BF16_FLAGS, make_engine

SENTENCES = [
    "a dog",
    "",
    "two red circles above a blue square",
    "Zwei Kinder spielen im Schnee. " * 5,
    "a",
    "longest " * 200,
]
HAS_BF16 = any(torch.cpu.get_capabilities().get(flag) for flag in BF16_FLAGS)


@pytest.fixture(scope="module")
def onnx_folder(small_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `nev export --format onnx` writes it, in two precisions."""
    from nev.export.onnx import write_runtime
    from nev.export.parts import TEXT_FOLDER, Options, write_spec

    folder = tmp_path_factory.mktemp("onnx")
    write_runtime(small_model, folder, Options(), ("fp32", "int8"), openvino=False)
    write_spec(small_model, folder, {}, TEXT_FOLDER)
    return folder


def squares(model: Model | Engine, count: int) -> np.ndarray:
    spec = model.spec if isinstance(model, Model) else model
    return np.stack([read_square(picture(n), spec.image_size, spec.limits).pixels for n in range(count)])


def check_engine(engine: Engine, model: Model, atol: float = 1e-5) -> None:
    """An engine gives the model's vectors, and says who it is."""
    found = engine.encode_texts([Sentence(text, "query") for text in SENTENCES])
    np.testing.assert_allclose([each.vector for each in found], model.encode_text(SENTENCES), atol=1e-5)
    assert [each.cut for each in found] == [False] * 5 + [True]
    assert [each.tokens for each in found] == [4, 2, 9, found[3].tokens, 3, model.text.longest]
    pictures = model.encode_image([picture(n) for n in range(5)])
    np.testing.assert_allclose(engine.encode_images(squares(model, 5)), pictures, atol=atol)
    assert (engine.name, engine.width, engine.fingerprint) == (model.spec.name, model.width, model.fingerprint)
    assert engine.text_fingerprint == model.text_fingerprint


def test_torch(small_location: str, small_model: Model) -> None:
    check_engine(open_engine(small_location, device="cpu", threads=1), small_model)


def test_prompts_of_both_kinds_in_one_forward(small_model: Model) -> None:
    prompts = {"query": "search_query: ", "document": "search_document: "}
    model = replace(small_model, spec=small_model.spec.model_copy(update={"prompts": prompts}))
    found = make_engine(model).encode_texts([Sentence("a dog", "query"), Sentence("a dog", "document")])
    for each, kind in zip(found, ("query", "document"), strict=True):
        np.testing.assert_allclose(each.vector, model.encode_text("a dog", kind=kind), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "gap"), [("fp32", 1e-6), ("int8", 0.02)])
def test_onnx(onnx_folder: Path, small_model: Model, precision: str, gap: float) -> None:
    engine = open_engine(str(onnx_folder), precision=precision, threads=1)
    check_engine(engine, small_model, 1e-5 if precision == "fp32" else 0.1)
    vectors = engine.encode_images(squares(engine, 6))
    exact = small_model.encode_image([picture(n) for n in range(6)])
    assert (1 - (vectors * exact).sum(axis=1)).max() <= gap
    alone = np.concatenate([engine.encode_images(square[None]) for square in squares(engine, 6)])
    np.testing.assert_allclose(alone, vectors, atol=1e-5)  # of int8, too: no picture changes the vector of another
    with TestClient(make_app(engine)) as client:
        answer = client.post("/v1/embeddings", json={"input": ["a dog", {"image": data_url(picture(2))}]})
        np.testing.assert_allclose(read_vectors(answer), [small_model.encode_text("a dog"), vectors[2]], atol=1e-5)


@pytest.mark.skipif(not HAS_BF16, reason="the processor has no bfloat16")
def test_bf16_changes_pictures_a_little_and_texts_not_at_all(small_model: Model) -> None:
    engine, exact = make_engine(small_model, "bf16"), make_engine(small_model)
    rough, fine = engine.encode_images(squares(engine, 6)), exact.encode_images(squares(engine, 6))
    assert 1e-9 < 1 - (rough * fine).sum(axis=1).min() < 0.01
    asked = [Sentence(text, "query") for text in SENTENCES]
    for one, other in zip(engine.encode_texts(asked), exact.encode_texts(asked), strict=True):
        assert one.vector.tolist() == other.vector.tolist()


@pytest.mark.slow
def test_precisions_that_there_are_not(small_location: str, onnx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for location, precision, says in (
        (small_location, "int8", "--format onnx"),
        (small_location, "fp16", "for GPUs"),
        (small_location, "fp8", "one of fp32"),
        (str(onnx_folder), "bf16", "it has fp32, int8"),
    ):
        with pytest.raises(ModelError, match=says):
            open_engine(location, precision=precision, device="cpu")
    with pytest.raises(ModelError, match="text encoder inside"):
        open_engine(str(onnx_folder), text="elsewhere")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.raises(ModelError, match="no instructions for bfloat16"):
        open_engine(small_location, precision="bf16", device="cpu")


@given(st.lists(st.integers(1, 10_000), max_size=50))
def test_short_texts_do_not_pay_for_long_ones(lengths: list[int]) -> None:
    groups = list(group_by_length(lengths))
    assert sorted(n for group in groups for n in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[n] for n in group)
        assert all(longest <= 2 * lengths[n] + FREE_PADDING for n in group)
        assert len(group) == 1 or len(group) * longest <= BATCH_TOKENS
    assert len(list(group_by_length([30] * 64))) == 1
