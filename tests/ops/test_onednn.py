"""Linear layers through oneDNN: the same numbers as nn.Linear's, forwards and backwards, and the tokens not copied."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nev.config.model import Vision
from nev.models.vision import build_vision
from nev.ops import onednn
from nev.ops.onednn import LEAST_BATCH, Linear1x1, add_product, is_faster, product, transposed, use_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")


@pytest.fixture(scope="module", autouse=True)
def as_if_faster():
    """oneDNN is used, whatever processor is here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "is_faster", lambda: True)
        yield


def pair(inputs: int, outputs: int, bias: bool) -> tuple[nn.Linear, nn.Linear]:
    """A layer of PyTorch's and the same one through oneDNN."""
    plain = nn.Linear(inputs, outputs, bias)
    ours = copy.deepcopy(plain)
    use_onednn(ours)
    assert type(ours) is Linear1x1
    return plain, ours


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 2 * LEAST_BATCH),
    tokens=st.integers(1, 40),
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


@pytest.mark.parametrize(
    ("name", "level", "faster"),
    [
        ("AMD EPYC", "AVX512", True),
        ("Unknown", "AVX512_VNNI", True),
        ("AMD EPYC", "AVX2", False),
        ("Intel Xeon", "AVX512", False),
    ],
)
def test_onednn_is_faster_where_mkl_leaves_avx512_unused(name, level, faster, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    assert is_faster.__wrapped__() == faster


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("rows", [2 * LEAST_BATCH, LEAST_BATCH + 1])
def test_products_through_either_library(rows, faster, monkeypatch):
    monkeypatch.setattr(onednn, "is_faster", lambda: faster)
    torch.manual_seed(0)
    left, weight, bias = torch.randn(rows, 7), torch.randn(5, 7), torch.randn(5)
    torch.testing.assert_close(product(left, weight, bias), left @ weight.T + bias)
    whole = torch.ones(rows, 9)
    add_product(whole[:, 2:7], left, transposed(weight).T)  # a part of a matrix, and a transpose
    add_product(whole[:, 2:7], left.T.contiguous().T, weight)
    torch.testing.assert_close(whole[:, 2:7], 1 + 2 * left @ weight.T)
    assert (whole[:, :2] == 1).all()
    assert (whole[:, 7:] == 1).all()


def test_tokens_are_not_copied():
    _, ours = pair(128, 512, True)
    tokens = torch.randn(LEAST_BATCH, 65, 128)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = ours(tokens)
    assert out.is_contiguous()
    names = {event.key for event in profile.key_averages()}
    assert "aten::mkldnn_convolution" in names
    assert not names & {"aten::contiguous", "aten::copy_", "aten::addmm"}


@pytest.mark.parametrize(
    ("shape", "dtype", "autocast"),
    [
        ((32, 6), torch.float32, False),
        ((32, 3, 6), torch.float64, False),
        ((32, 2, 3, 6), torch.float32, False),
        ((LEAST_BATCH - 1, 3, 6), torch.float32, False),
        ((32, 3, 6), torch.float32, True),
    ],
)
def test_all_else_is_left_to_torch(shape, dtype, autocast, monkeypatch):
    def refuse(*args):
        raise AssertionError("a convolution was called")

    plain, ours = pair(6, 5, True)
    x = torch.randn(shape, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = plain.to(dtype)(x)
        monkeypatch.setattr(torch.nn.functional, "conv2d", refuse)
        assert torch.equal(ours.to(dtype)(x), expected)


def test_a_tower_has_the_same_gradient():
    """The figure in docs/architecture.md: the difference is some 1e-6 of the gradient's norm."""
    torch.manual_seed(0)
    trunk = {"patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}
    tower = build_vision(Vision(trunk="vit_tiny_patch16_224", trunk_args=trunk), image_size=32, width=24)
    layers = [module for module in tower.modules() if isinstance(module, nn.Linear)]
    assert len(layers) >= 4 * 4 + 1
    assert {type(layer) for layer in layers} == {Linear1x1}
    plain = copy.deepcopy(tower)
    for layer in plain.modules():
        if type(layer) is Linear1x1:
            layer.__class__ = nn.Linear
    images, weights = torch.randn(LEAST_BATCH, 3, 32, 32), torch.randn(LEAST_BATCH, 24)
    for model in (tower, plain):
        (model(images) * weights).sum().backward()
    ours, theirs = (torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (tower, plain))
    assert 0 < (ours - theirs).norm() < 5e-6 * theirs.norm()
