"""`nev export --format nomic`: the released layout, written back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import make_experiment, write_bert, write_checkpoint
from helpers.nomic import VisionSizes, released_vision_config, write_released_vision
from helpers.nomic_text import TextSizes, released_text_config, write_released_text
from safetensors.torch import load_file

import nev
from nev.config.model_spec import ModelError
from nev.export.export import export
from nev.export.parts import Options, sample_pictures

SIZES = VisionSizes(dim=48, hidden=256, depth=3, patch=8, grid=4, heads=4)
SQUARES = sample_pictures(32)
# A tower that nev trains in the released architecture, wide enough for the released code (an MLP of 256).
EVA = {
    "trunk": "eva02_base_patch14_224",
    "trunk_args": {
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 4,
        "mlp_ratio": 5.34,
        "ref_feat_shape": [7, 7],
    },
    "final_norm": False,
    "pool": "nomic",
    "pool_hidden": 256,
}


def test_what_came_from_a_released_folder_goes_back_bit_for_bit(tmp_path: Path) -> None:
    source, back = tmp_path / "nomic-embed-vision-v1.5", tmp_path / "back"
    tensors = write_released_vision(source, SIZES, ref_feat_shape=[6, 6])
    text = str(tmp_path / "text")
    write_released_text(tmp_path / "text", TextSizes(dim=48), released_text_config(TextSizes(dim=48)), 64)
    model = nev.load(source, text=text)
    done = export(model, "nomic", str(back), Options(license="apache-2.0"))
    assert [check.difference for check in done.checks] == [0.0]
    written = load_file(back / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    config = json.loads((back / "config.json").read_text())
    theirs = {**released_vision_config(SIZES), "ref_feat_shape": [6, 6]}
    del theirs["auto_map"], theirs["rotary_emb_base"]  # the base is of no use without rotary_emb_fraction
    assert {name: config.get(name) for name in theirs} == theirs
    assert config["auto_map"]["AutoModel"] == "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicVisionModel"
    pixels = json.loads((back / "preprocessor_config.json").read_text())
    assert (pixels["image_mean"], pixels["image_std"]) == ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    assert sorted(path.name for path in back.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "nev.json",
        "preprocessor_config.json",
    ]
    opened = nev.load(back, text=text)
    np.testing.assert_array_equal(opened.encode_image(SQUARES), model.encode_image(SQUARES))
    np.testing.assert_array_equal(opened.encode_text(["a red dog"]), model.encode_text(["a red dog"]))
    assert opened.spec.text == model.spec.text


def test_without_nev_json_it_is_a_released_folder(tmp_path: Path) -> None:
    model = nev.load(write_checkpoint(make_experiment(tmp_path, EVA)))
    export(model, "nomic", str(tmp_path / "out"), Options())
    (tmp_path / "out" / "nev.json").unlink()
    loaded = nev.load(tmp_path / "out")
    np.testing.assert_allclose(loaded.encode_image(SQUARES), model.encode_image(SQUARES), rtol=0, atol=1e-6)
    assert loaded.spec.vision.trunk_args["ref_feat_shape"] == [7, 7]


def test_a_trained_tower_opens_with_its_text_encoder(tmp_path: Path) -> None:
    config = make_experiment(tmp_path, EVA)
    model = nev.load(write_checkpoint(config, metrics={"zero_shot/top1": 0.5}))
    export(model, "nomic", str(tmp_path / "out"), Options())
    opened = nev.load(tmp_path / "out", text=config.text.encoder)
    np.testing.assert_allclose(opened.encode_image(SQUARES), model.encode_image(SQUARES), rtol=0, atol=1e-6)
    np.testing.assert_allclose(opened.encode_text(["two dogs"]), model.encode_text(["two dogs"]), rtol=0, atol=1e-6)
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix in (".json", ".md"))
    assert str(tmp_path) not in written
    assert "zero-shot classification, top 1 | 50.0 %" in written


def test_the_text_encoder_that_is_not_inside_must_be_the_same(tmp_path: Path) -> None:
    model = nev.load(write_checkpoint(make_experiment(tmp_path, EVA)))
    export(model, "nomic", str(tmp_path / "out"), Options())
    assert json.loads((tmp_path / "out" / "nev.json").read_text())["text"]["encoder"] == "encoder"
    with pytest.raises(ModelError, match=r"'encoder' cannot be loaded(?s:.*)nev\.load\(\.\.\., text=\.\.\.\)"):
        nev.load(tmp_path / "out").encode_text("a dog")
    other = write_bert(tmp_path / "other", layers=2)
    with pytest.raises(ModelError, match="is not the text encoder that small was trained against"):
        nev.load(tmp_path / "out", text=str(other)).encode_text("a dog")


def test_a_text_tower_that_was_trained_is_not_the_one_of_its_name(tmp_path: Path) -> None:
    config = make_experiment(tmp_path, EVA, lock="none")
    model = nev.load(write_checkpoint(config))
    export(model, "nomic", str(tmp_path / "out"), Options())
    with pytest.raises(ModelError, match="is not the text encoder"):
        nev.load(tmp_path / "out", text=config.text.encoder).encode_text("a dog")
    export(model, "hf", str(tmp_path / "hf"), Options())
    texts = nev.load(tmp_path / "out", text=str(tmp_path / "hf" / "text")).encode_text("a dog")
    np.testing.assert_allclose(texts, model.encode_text("a dog"), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        (
            {},
            r"is another: give the format hf\. (?s:.*)not a tower in nomic-embed-vision's architecture\n  missing: trunk\.blocks",
        ),
        ({**EVA, "final_norm": True}, r"unknown: trunk\.norm\.weight, trunk\.norm\.bias"),
        ({**EVA, "head": "linear"}, r"unknown: head\.weight, head\.bias"),
        ({**EVA, "pool": "map"}, r"unknown: pool\.mlp\.fc1\.weight"),
        ({**EVA, "pool_heads": 2}, "its trunk has 4 attention heads and its pool 2"),
        ({**EVA, "pool_hidden": 512}, "the MLP of its blocks is 256 wide and that of its pool 512"),
        (
            {**EVA, "trunk_args": {**EVA["trunk_args"], "mlp_ratio": 2.67}, "pool_hidden": 128},
            "128 wide, .*multiple of 256",
        ),
        ({**EVA, "trunk_args": {**EVA["trunk_args"], "use_rot_pos_emb": False}}, "the vectors are not the model's"),
    ],
    ids=["vit", "norm", "head", "map", "heads", "hidden", "multiple", "no rotary"],
)
def test_another_architecture_is_refused(vision: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = nev.load(write_checkpoint(make_experiment(tmp_path, vision)))
    with pytest.raises(ModelError, match=message):
        export(model, "nomic", str(tmp_path / "out"), Options())
    assert not (tmp_path / "out").exists()
