"""The format `onnx`: the graphs compute what the model computes, and a reader without nev and torch sees what nev sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.models import SIZE, WIDTH, make_experiment, write_checkpoint
from helpers.pictures import encoded, photo
from helpers.processes import run_python
from PIL import Image
from safetensors.torch import save_file

import nev
from nev.config.model import Vision
from nev.config.model_spec import ModelError
from nev.export import onnx as onnx_format
from nev.export import onnx_graph
from nev.export.export import Exported, export
from nev.export.parts import SENTENCES, Options, embed_squares, normalise_squares, sample_pictures
from nev.export.templates import reader
from nev.inference.model import Model
from nev.models.trunk import build_trunk
from nev.ops.onednn import Linear1x1

pytestmark = pytest.mark.slow

CONV = {"trunk": "test_efficientnet", "trunk_args": {}, "pool": "mean"}
FROZEN = {
    **CONV,
    "lock": "trunk",
    "standardise": True,
    "head": "swiglu",
    "precision": "bf16",
}


class Case(NamedTuple):
    """A model, its export, and what the model was before it."""

    model: Model
    folder: Path
    done: Exported
    before: dict[str, torch.Tensor]


def make_model(folder: Path, vision: dict[str, Any] | None = None, **text: Any) -> Model:
    encoder = make_experiment(folder).text
    section = encoder.model_dump() | text
    return nev.load(write_checkpoint(make_experiment(folder, vision, text=section)), device="cpu")


def write(model: Model, folder: Path, text: bool = True) -> Exported:
    return export(model, "onnx", str(folder), Options(text, "apache-2.0"))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Every linear layer is one through oneDNN, which chooses its operator by the batch."""
    root = tmp_path_factory.mktemp("onnx")
    model = make_model(root, prefix="search_query: ", layer_norm=True)
    for module in model.vision.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Linear1x1
    before = {name: tensor.clone() for name, tensor in model.vision.state_dict().items()}
    return Case(model, root / "out", write(model, root / "out"), before)


def test_what_is_written_and_how_near_it_is(case: Case) -> None:
    results = {str(file.relative_to(case.folder)) for file in case.folder.rglob("*") if file.is_file()}
    graphs = {f"{tower}/{file}" for tower in ("vision", "text") for file in onnx_format.FILES.values()}
    for graph in graphs:
        onnx.checker.check_model(case.folder / graph, full_check=True)
    assert graphs | {"README.md", "nev.json", "preprocessing.json", "reader.py", "tokenizer.json"} <= results
    gaps = {check.what: check for check in case.done.checks if check.consumer == "onnxruntime"}
    for tower in ("vision", "text"):
        assert gaps[f"{tower}, fp32"].difference <= 1e-5
        assert 1e-9 < gaps[f"{tower}, fp16"].gap <= 1e-5
        assert 1e-9 < gaps[f"{tower}, int8"].gap <= 0.02
        sizes = [(case.folder / tower / file).stat().st_size for file in onnx_format.FILES.values()]
        assert sizes == sorted(sizes, reverse=True)
    card = (case.folder / "README.md").read_text(encoding="utf-8")
    assert "from reader import Model" in card
    assert "| onnxruntime | vision, int8 |" in card
    assert "left out" not in card


def test_the_callers_model_is_untouched(case: Case) -> None:
    after = case.model.vision.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in case.before.items())
    assert any(type(module) is Linear1x1 for module in case.model.vision.modules())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_pictures_in_another_batch_than_the_examples(case: Case, precision: str, batch: int) -> None:
    session = onnxruntime.InferenceSession(case.folder / "vision" / onnx_format.FILES[precision])
    squares = sample_pictures(SIZE, batch)
    results = session.run(None, {"pixel_values": normalise_squares(case.model, squares)})[0]
    expected = embed_squares(case.model, squares)
    assert results.dtype == np.float32
    assert abs(np.linalg.norm(results, axis=1) - 1).max() < 1e-6
    assert 1 - (results * expected).sum(axis=1).min() < {"fp32": 1e-6, "fp16": 1e-5, "int8": 0.02}[precision]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("length", [3, 8, 24])
def test_texts_of_another_length_than_the_examples(case: Case, precision: str, length: int) -> None:
    session = onnxruntime.InferenceSession(case.folder / "text" / onnx_format.FILES[precision])
    ids = np.random.default_rng(length).integers(1000, 20000, (5, length))
    mask = (np.arange(length) < np.array([[length], [1], [2], [length - 1], [3]])).astype(np.int64)
    results = session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
    tower = onnx_graph.TextGraph(case.model.text.model, "mean", layer_norm=True)
    with torch.inference_mode():
        expected = tower(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    assert 1 - (results * expected).sum(axis=1).min() < {"fp32": 1e-6, "fp16": 1e-5, "int8": 0.02}[precision]


def test_the_reader_needs_neither_nev_nor_torch(case: Case, tmp_path: Path) -> None:
    sideways = Image.Exif()
    sideways[0x0112] = 6
    pictures = {
        "tall.png": encoded(photo(1, 60, 91), "PNG"),
        "turned.jpg": encoded(photo(2, 80, 50), exif=sideways, quality=95),
        "clear.png": encoded(Image.merge("RGBA", [*photo(3, 40, 40).split(), photo(4, 40, 40).getchannel(0)]), "PNG"),
    }
    for name, data in pictures.items():
        (tmp_path / name).write_bytes(data)
    texts = [*SENTENCES, "tall.png", "a long sentence about many dogs " * 20]
    code = """
import json
sys.path.insert(0, sys.argv[1])
import numpy as np
from PIL import Image
from reader import Model

model = Model(sys.argv[1])
paths = [sys.argv[2] + "/" + name for name in ("tall.png", "turned.jpg", "clear.png")]
np.savez(
    sys.argv[2] + "/results.npz",
    paths=model.encode_image(paths, batch_size=2),
    bytes=model.encode_image([open(path, "rb").read() for path in paths]),
    opened=model.encode_image([Image.open(path) for path in paths]),
    one=model.encode_image(paths[0]),
    texts=model.encode_text(json.loads(sys.argv[3]), batch_size=4),
    documents=model.encode_text("a dog", kind="document"),
    none=model.encode_text([]),
)
"""
    without = ["nev", "torch", "timm", "transformers", "sentence_transformers", "simplejpeg"]
    run_python(code, case.folder, tmp_path, json.dumps(texts), without=without)
    results = np.load(tmp_path / "results.npz")
    expected = case.model.encode_image(list(pictures.values()))
    for form in ("paths", "bytes", "opened"):
        assert 1 - (results[form] * expected).sum(axis=1).min() < 1e-4
    assert abs(results["one"] - results["paths"][:1]).max() < 1e-6
    assert abs(results["texts"] - case.model.encode_text(texts)).max() < 1e-5
    assert abs(results["documents"] - case.model.encode_text(["a dog"], kind="document")).max() < 1e-5
    assert results["none"].shape == (0, WIDTH)


def test_real_photographs_give_the_same_vectors(case: Case, data_folder: Path) -> None:
    files = sorted((data_folder / "imagenet_sample").glob("*.JPEG"))[:24]
    results, expected = reader.Model(case.folder).encode_image(files), case.model.encode_image(files)
    assert 1 - (results * expected).sum(axis=1).min() < 1e-3


def test_a_text_is_a_text(case: Case) -> None:
    one = reader.Model(case.folder)
    with pytest.raises(ValueError, match="kind 'title': it is query or document"):
        one.encode_text(["a"], kind="title")
    with pytest.raises(TypeError):
        one.encode_text([b"bytes"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"vision is not here in 'int4', but in \['fp32', 'fp16', 'int8'\]"):
        reader.Model(case.folder, "int4").encode_image([photo(0)])


def test_nev_refuses_the_folder_with_the_way_out(case: Case) -> None:
    with pytest.raises(ModelError, match="export for another runtime"):
        nev.load(case.folder)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_vector_does_not_depend_on_what_is_embedded_beside_it(case: Case, precision: str) -> None:
    """A dynamic scale belongs to a whole forward, padding included (onnxruntime's issues 8625, 10111)."""
    model, texts = reader.Model(case.folder, precision), list(SENTENCES[:2])
    pictures = [Image.fromarray(square) for square in sample_pictures(32, 3)]
    for encode, items in ((model.encode_text, texts), (model.encode_image, pictures)):
        alone = np.concatenate([encode([item]) for item in items])
        np.testing.assert_allclose(encode(items), alone, atol=1e-6)
        moved = abs(encode(items, batch_size=len(items)) - alone).max()
        assert moved > 1e-5 if precision == "int8" else moved <= 1e-6


def test_a_form_that_is_too_far_is_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder without the text tower, and with weights beside the graph, as for a tower of more than 2 GB."""
    monkeypatch.setattr(onnx_format, "INT8", 1e-12)
    monkeypatch.setattr(onnx_graph, "ONE_FILE", 1000)
    done = write(make_model(tmp_path), tmp_path / "out", text=False)
    assert [check.what for check in done.checks if check.left_out] == ["vision, int8"]
    results = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.onnx*")}
    graphs = {"vision/model.onnx", "vision/model_fp16.onnx"}
    assert results == graphs | {f"{graph}.data" for graph in graphs}
    assert (tmp_path / "out/vision/model.onnx").stat().st_size < (
        tmp_path / "out/vision/model.onnx.data"
    ).stat().st_size
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "vision, int8" in card
    assert "left out: too far from the model" in card
    with pytest.raises(ValueError, match=r"not here in 'int8', but in \['fp32', 'fp16'\]"):
        reader.Model(tmp_path / "out", "int8").encode_image([photo(0)])
    with pytest.raises(ValueError, match=r"text is not here in 'fp32', but in \[\]"):
        reader.Model(tmp_path / "out").encode_text(["a dog"])


def test_a_locked_trunk_in_bfloat16_is_written_in_float32_and_compared_with_both(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "trunk.safetensors"
    trunk = build_trunk(Vision(**CONV), SIZE)
    for _ in range(30):
        trunk.train()(torch.rand(16, 3, SIZE, SIZE))  # its batch norms learn scales, so that features are not all alike
    save_file(trunk.state_dict(), weights)
    done = write(make_model(tmp_path, {**FROZEN, "weights": str(weights)}), tmp_path / "out", text=False)
    checks = {check.what: check for check in done.checks if check.consumer != "openvino"}
    assert list(checks) == ["vision, in place of bfloat16", "vision, fp32", "vision, fp16", "vision, int8"]
    assert 1e-6 < checks["vision, in place of bfloat16"].gap < 0.01
    assert checks["vision, fp32"].difference <= 1e-4


class ByItsPixels(torch.nn.Module):
    """A pool that no graph can express: what it computes depends on the numbers."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, 0] if float(tokens.sum()) > 0 else tokens[:, 1]


def test_a_tower_that_no_graph_can_express(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    model.vision.pool = ByItsPixels()
    with pytest.raises(ModelError, match="the vision tower cannot be written as an ONNX graph"):
        write(model, tmp_path / "out", text=False)
    assert not (tmp_path / "out").exists()


def test_openvino_reads_and_computes_the_same(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed: its form is written where it is")
    model = make_model(tmp_path)
    done = write(model, tmp_path / "out")
    checks = {check.what: check for check in done.checks if check.consumer == "openvino"}
    assert checks["vision, fp32"].difference <= 1e-5
    assert checks["text, fp32"].difference <= 1e-5
    compiled = openvino.Core().compile_model(
        tmp_path / "out/openvino/vision.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    squares = sample_pictures(SIZE, 3)
    results = compiled(normalise_squares(model, squares))["embedding"]
    assert abs(results - embed_squares(model, squares)).max() <= 1e-5
