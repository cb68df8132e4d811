"""Linear layers through oneDNN: the same numbers as nn.Linear's, forwards and backwards, and nothing copied."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nev.config import Vision
from nev.models.onednn import Linear1x1, through_onednn
from nev.models.vision import build_vision

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")


def pair(inputs: int, outputs: int, bias: bool) -> tuple[nn.Linear, nn.Linear]:
    """A layer of PyTorch's and the same one through oneDNN."""
    plain = nn.Linear(inputs, outputs, bias)
    ours = copy.deepcopy(plain)
    through_onednn(ours)
    assert type(ours) is Linear1x1
    return plain, ours


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 5),
    tokens=st.integers(1, 70),
    inputs=st.integers(1, 130),
    outputs=st.integers(1, 130),
    bias=st.booleans(),
    crossed=st.booleans(),
)
def test_values_and_gradients_are_those_of_linear(batch, tokens, inputs, outputs, bias, crossed):
    torch.manual_seed(0)
    plain, ours = pair(inputs, outputs, bias)
    x = torch.randn(tokens, batch, inputs).transpose(0, 1) if crossed else torch.randn(batch, tokens, inputs)
    weights = torch.randn(batch, tokens, outputs)
    found = []
    for layer in (plain, ours):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        out = layer(leaf)
        (out * weights).sum().backward()
        found.append([out, leaf.grad, *(parameter.grad for parameter in layer.parameters())])
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-4)


def test_tokens_are_not_copied():
    _, ours = pair(128, 512, True)
    out = ours(torch.randn(8, 65, 128))
    assert out.is_contiguous()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours(torch.randn(8, 65, 128))
    names = {event.key for event in profile.key_averages()}
    assert "aten::mkldnn_convolution" in names
    assert not names & {"aten::contiguous", "aten::copy_", "aten::addmm"}


@pytest.mark.parametrize("x", [torch.randn(4, 6), torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 2, 3, 6)])
def test_other_inputs_go_as_before(x):
    plain, ours = pair(6, 5, True)
    assert torch.equal(ours.to(x.dtype)(x), plain.to(x.dtype)(x))


def test_autocast_is_left_to_torch():
    plain, ours = pair(6, 5, True)
    x = torch.randn(2, 3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
        assert torch.equal(ours(x), plain(x))


def test_every_linear_of_a_tower_goes_this_way():
    small = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    tower = build_vision(Vision(trunk="vit_tiny_patch16_224", trunk_args=small), image_size=32, width=24)
    layers = [module for module in tower.modules() if isinstance(module, nn.Linear)]
    assert len(layers) >= 2 * 4 + 1
    assert all(type(layer) is Linear1x1 for layer in layers)
