"""The released nomic-embed-vision and nomic-embed-text, as their folders lie on the hub, through `nev.load`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.nomic import VisionSizes, released_forward, released_shapes, released_vision_config, write_released_vision
from helpers.nomic_text import TextSizes, layer_norm_unit, released_text_config, text_by_hand, write_released_text
from safetensors.torch import save_file

import nev
from nev.config.model_spec import ModelError
from nev.inference.released import CLIP_MEAN, describe_released
from nev.models.image_encoder import build_image_encoder
from nev.models.nomic import from_released

SMALL = VisionSizes()
PADDED = 64  # rows of the table of words
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)  # of helpers.nomic's preprocessor_config.json


def squares(sizes: VisionSizes) -> np.ndarray:
    side = sizes.patch * sizes.grid
    return np.random.default_rng(0).integers(0, 256, (5, side, side, 3), np.uint8)


def by_hand(tensors: dict[str, torch.Tensor], sizes: VisionSizes, ref: int | None = None) -> np.ndarray:
    """The unit vectors of `squares`, in float64."""
    pixels = torch.from_numpy((squares(sizes) / 255 - MEAN) / STD).permute(0, 3, 1, 2)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    return F.normalize(released_forward(wide, pixels, sizes, ref), dim=1).numpy()


def write_text(folder: Path, dim: int) -> tuple[str, dict[str, torch.Tensor], TextSizes]:
    sizes = TextSizes(dim=dim)
    return str(folder), write_released_text(folder, sizes, released_text_config(sizes), PADDED), sizes


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize(
    "sizes",
    [SMALL, VisionSizes(dim=76, hidden=212, depth=3, patch=4, grid=7, heads=1)],
    ids=["small", "other sizes"],
)
def test_it_computes_what_the_released_code_computes(sizes: VisionSizes, pickled: bool, tmp_path: Path) -> None:
    folder = tmp_path / "nomic-embed-vision-v1.5"
    tensors = write_released_vision(folder, sizes)
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    text, weights, text_sizes = write_text(tmp_path / "text", sizes.dim)
    model = nev.load(folder, text=text)
    np.testing.assert_allclose(model.encode_image(squares(sizes)), by_hand(tensors, sizes), rtol=0, atol=1e-5)
    mean = text_by_hand(weights, "[CLS] search _ query : a red dog [SEP]", text_sizes)
    np.testing.assert_allclose(model.encode_text("a red dog"), layer_norm_unit(mean), rtol=0, atol=1e-6)
    assert model.spec.prompts == {"query": "search_query: ", "document": "search_document: "}
    assert model.spec.text.encoder == "nomic-ai/nomic-embed-text-v1.5"
    assert model.width == sizes.dim


def test_v1_has_no_layer_norm(tmp_path: Path) -> None:
    folder = tmp_path / "nomic-embed-vision-v1"
    write_released_vision(folder, SMALL)
    text, weights, sizes = write_text(tmp_path / "text", SMALL.dim)
    model = nev.load(f"{folder}/", text=text)
    mean = text_by_hand(weights, "[CLS] search _ query : cat [SEP]", sizes)
    np.testing.assert_allclose(model.encode_text("cat"), F.normalize(mean, dim=0), rtol=0, atol=1e-6)
    assert model.spec.text.encoder == "nomic-ai/nomic-embed-text-v1"


@pytest.mark.parametrize(("written", "ref"), [([7, 7], 7), (7, 7), (None, None)])
def test_the_place_of_a_patch_is_scaled_as_config_json_says(written: Any, ref: int | None, tmp_path: Path) -> None:
    tensors = write_released_vision(tmp_path, SMALL, ref_feat_shape=written)
    vectors = nev.load(tmp_path).encode_image(squares(SMALL))
    np.testing.assert_allclose(vectors, by_hand(tensors, SMALL, ref), rtol=0, atol=1e-5)
    if ref:
        assert np.abs(vectors - by_hand(tensors, SMALL)).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_rotary_pos_emb", False),
        ("rotary_emb_fraction", 1.0),
        ("prenorm", False),
        ("layer_norm_epsilon", 1e-5),
        ("activation_function", "geglu"),
        ("global_pool", "avg"),
        ("img_size", 64),
        ("patch_size", 16),
        ("n_embd", 96),
        ("n_layer", 3),
    ],
)
def test_a_config_of_another_model_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    write_released_vision(tmp_path, SMALL, **{name: value})
    with pytest.raises(ModelError, match=f"config.json has {name} {value!r}"):
        nev.load(tmp_path)


def test_half_a_folder(tmp_path: Path) -> None:
    write_released_vision(tmp_path, SMALL)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json with n_head is missing"):
        nev.load(tmp_path)
    (tmp_path / "config.json").write_text('{"n_head":')
    with pytest.raises(ModelError, match=r"config\.json: damaged"):
        nev.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selector.norm1.bias": None}, r"missing: selector\.norm1\.bias\n"),
        ({"layers.1.attn.Wqkv.weight": None}, r"missing: layers\.1\.attn\.Wqkv\.weight\n"),
        ({"layers.4000000000.norm1.weight": torch.zeros(48)}, r"unknown: layers\.4000000000\.norm1\.weight"),
        ({"embeddings.reg_token": torch.zeros(1, 1, 48)}, r"unknown: embeddings\.reg_token"),
        ({"selector.norm1.bias": torch.zeros(47)}, "size mismatch"),
        ({"embeddings.cls_token": torch.zeros(())}, "is not a whole nomic-embed-vision"),
        ({"embeddings.pos_embed": torch.zeros(1, 16, 48)}, "img_size 32 for 24"),
    ],
    ids=["part", "layer", "giant layer", "register", "shape", "scalar", "positions"],
)
def test_tensors_that_are_not_whole(changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor | None] = {**write_released_vision(tmp_path, SMALL), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message) as caught:
        nev.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    folder, proof = tmp_path / "model", tmp_path / "executed"
    tensors = write_released_vision(folder, SMALL)
    (folder / "model.safetensors").unlink()
    torch.save({**tensors, "more": Trap(proof)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="not readable as weights"):
        nev.load(folder)
    assert not proof.exists()


def test_text_encoders_that_cannot_be(tmp_path: Path) -> None:
    folder = tmp_path / "nomic-embed-vision-v1.5"
    write_released_vision(folder, SMALL)
    model = nev.load(folder)
    assert model.encode_image(squares(SMALL)).shape == (5, SMALL.dim)  # pictures need no text encoder
    with pytest.raises(ModelError, match=r"nomic-embed-text-v1\.5' cannot be loaded(?s:.*)nev\.load\(\.\.\., text="):
        model.encode_text("a dog")
    with pytest.raises(ModelError, match="is a vision model"):
        nev.load(folder, text=str(folder)).encode_text("a dog")
    narrow, _, _ = write_text(tmp_path / "narrow", 24)
    with pytest.raises(ModelError, match="is not the text encoder"):
        nev.load(folder, text=narrow).encode_text("a dog")


def test_a_text_encoder_is_no_model(tmp_path: Path) -> None:
    text, _, _ = write_text(tmp_path / "text", 24)
    with pytest.raises(
        ModelError, match=r"is no model of nev: .*A text encoder goes into an experiment, as text\.encoder"
    ):
        nev.load(text)


def test_a_trunk_in_the_same_file_name_is_not_taken_for_it(tmp_path: Path) -> None:
    tensors = write_released_vision(tmp_path, SMALL)
    del tensors["selector.attn.latent"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="is no model of nev"):
        nev.load(tmp_path)


def test_the_published_size(tmp_path: Path) -> None:
    """By shapes alone: 211 tensors, 12 layers, 768 wide, 224 px."""
    sizes = VisionSizes(dim=768, hidden=2048, depth=12, patch=16, grid=14, heads=12)
    (tmp_path / "config.json").write_text(json.dumps(released_vision_config(sizes)))
    tensors = {name: torch.empty(shape, device="meta") for name, shape in released_shapes(sizes).items()}
    spec = describe_released(tensors, tmp_path, "nomic-embed-vision-v1.5")
    assert len(tensors) == 211
    assert (spec.image_size, spec.width, spec.mean) == (224, 768, CLIP_MEAN)
    with torch.device("meta"):
        encoder = build_image_encoder(spec.vision, spec.image_size, spec.width)
    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in from_released(tensors).items()}
    assert encoder.trunk.rope.ref_feat_shape == (14, 14)
