"""Rotary embeddings of a graph: the same vectors from another order of queries and keys."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from nev.export.onnx_graph import write_vision_graph
from nev.export.rotary import simplify_rotary

EVA = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 0}


def make(name: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    trunk: nn.Module = timm.create_model(name, **{**EVA, **settings}).eval()
    for parameter in trunk.parameters():
        nn.init.normal_(parameter, std=0.2)
    return trunk


@pytest.mark.slow
def test_a_graph_without_strides_gives_the_same_vectors(tmp_path: Path) -> None:
    trunk, pictures = make("eva02_base_patch14_224", ref_feat_shape=(6, 6)), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = trunk(pictures)
        simplify_rotary(trunk)
        torch.testing.assert_close(trunk(pictures), expected, rtol=0, atol=2e-5)
    write_vision_graph(trunk, 32, tmp_path / "model.onnx")  # type: ignore[arg-type]
    graph = onnx.load(tmp_path / "model.onnx").graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    steps = [constants.get(node.input[4]) for node in graph.node if node.op_type == "Slice" and len(node.input) > 4]
    assert all(step is not None and (step == 1).all() for step in steps)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    np.testing.assert_allclose(session.run(None, {"pixel_values": pictures.numpy()})[0], expected.numpy(), atol=2e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_tiny_patch16_224", {}),
        ("eva02_base_patch14_224", {"use_rot_pos_emb": False}),
        ("eva02_base_patch14_224", {"qkv_fused": True}),
        ("eva02_base_patch14_224", {"qk_norm": True}),
    ],
)
def test_other_trunks_stay_as_they_are(name: str, settings: dict[str, Any]) -> None:
    trunk = make(name, **settings)
    before = copy.deepcopy(trunk.state_dict())
    simplify_rotary(trunk)
    assert all(torch.equal(tensor, before[key]) for key, tensor in trunk.state_dict().items())
    assert not any(getattr(module, "rotate_half", False) for module in trunk.modules())
