"""Scores a tile at a time: any shape of tiles gives the whole matrix's loss, and that matrix is never there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.losses import gradients, inputs, log_scale_of, naive
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nev.losses import tiles
from nev.losses.contrastive import contrastive_loss
from nev.ops import onednn


@pytest.fixture
def slow_walks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one where a loss needs a shift for each row and column."""
    made: list[int] = []
    original = tiles.LogSums.with_own_shifts

    def counted(self: tiles.LogSums) -> tiles.LogSums:
        made.append(1)
        return original(self)

    monkeypatch.setattr(tiles.LogSums, "with_own_shifts", counted)
    return made


@given(
    mask=st.lists(st.booleans(), min_size=1, max_size=24),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    scale=st.floats(0.1, 3000),
    seed=st.integers(0, 999),
    asked=st.booleans(),
)
def test_any_tiles_give_the_naive_loss(
    mask: list[bool], shape: tuple[int, int], scale: float, seed: int, asked: bool
) -> None:
    mask[seed % len(mask)] = True
    valid = torch.tensor(mask)
    image, text = inputs(len(mask), 5, seed)
    log_scale = log_scale_of(scale)
    want = naive(image, text, log_scale, valid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_ROWS", shape[0])
        patch.setattr(tiles, "TILE_COLUMNS", shape[1])
        if not asked:  # a GPU's way
            patch.setattr(tiles, "is_in_window", lambda shifted, counts: False)
        got = contrastive_loss(image, text, log_scale, valid)
    torch.testing.assert_close(got.loss, want, rtol=1e-10, atol=1e-9)
    for ours, theirs in zip(gradients(got.loss, image, log_scale), gradients(want, image, log_scale), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    hits = (image[valid] @ text[valid].T).argmax(1) == torch.arange(sum(mask))
    assert got.correct.item() == hits.sum().item()


@pytest.mark.parametrize(("scale", "slow"), [(0.01, False), (14.3, False), (100.0, False), (1000.0, True)])
@pytest.mark.parametrize("kind", ["random", "aligned", "opposite", "collapsed"])
def test_float32_equals_float64_at_any_spread(scale: float, slow: bool, kind: str, slow_walks: list[int]) -> None:
    image, text = inputs(40, 6)
    if kind != "random":
        image = {"aligned": text, "opposite": -text, "collapsed": text[:1].expand(40, -1)}[kind]
    exact = image.detach().clone().requires_grad_()
    want = naive(exact, text, log_scale_of(scale))
    found = exact.detach().float().requires_grad_()
    got = contrastive_loss(found, text.float(), log_scale_of(scale, torch.float32)).loss
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(got, found)[0].double(), gradients(want, exact)[0]
    assert (ours - theirs).abs().max() <= 1e-5 * max(scale, 1)
    assert bool(slow_walks) <= (scale >= 100), "a usual scale needs one shift alone"
    if kind == "random":
        assert bool(slow_walks) == slow


@pytest.mark.parametrize("through_onednn", [True, False])
def test_float32_rows_are_left_out(through_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "is_faster", lambda: through_onednn)
    monkeypatch.setattr(tiles, "TILE_ROWS", 32)
    monkeypatch.setattr(tiles, "TILE_COLUMNS", 24)
    image, text = inputs(96, 8, dtype=torch.float32)
    valid = torch.arange(96) % 5 != 2
    exact = image.detach().double().requires_grad_()
    want = naive(exact, text.double(), log_scale_of(20.0), valid)
    dirty = text.masked_fill(~valid[:, None], torch.nan)
    got = contrastive_loss(image, dirty, log_scale_of(20.0, torch.float32), valid).loss
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    theirs = gradients(want, exact)[0]
    torch.testing.assert_close(gradients(got, image)[0].double(), theirs, rtol=1e-4, atol=1e-7)


def test_one_shift_is_enough_for_the_scales_of_a_run(slow_walks: list[int]) -> None:
    for strength in (0.0, 0.3, 1.0, 3.0):  # from random vectors to pairs that are found without fail
        for scale in (1 / 0.07, 100.0):
            noise, text = inputs(512, 64, dtype=torch.float32)
            image = torch.nn.functional.normalize(noise.detach() + strength * text).requires_grad_()
            contrastive_loss(image, text, log_scale_of(scale, torch.float32)).loss.backward()
    assert not slow_walks


@given(
    captions=st.lists(st.integers(0, 3), min_size=1, max_size=24), shape=st.tuples(st.integers(1, 9), st.integers(1, 9))
)
def test_of_equal_scores_the_first_counts_in_any_tiles(captions: list[int], shape: tuple[int, int]) -> None:
    text = torch.eye(4)[captions]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_ROWS", shape[0])
        patch.setattr(tiles, "TILE_COLUMNS", shape[1])
        got = contrastive_loss(text, text, log_scale_of(dtype=torch.float32))
    assert got.correct.item() == len(set(captions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inputs_are_left_alone(dtype: torch.dtype) -> None:
    image, text = inputs(dtype=dtype)
    before = image.detach().clone(), text.clone()
    contrastive_loss(image, text.requires_grad_(), log_scale_of(dtype=dtype)).loss.backward()
    assert torch.equal(image, before[0])
    assert torch.equal(text, before[1])


class Watch(TorchDispatchMode):
    """largest: most numbers that a tensor had which an operation gave. products: FLOPs of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, Tensor):
                self.largest = max(self.largest, one.numel())
        if "mm" in func.__name__:
            left, right = args[-2:]
            self.products += 2 * left.numel() * right.shape[-1]
        if "convolution" in func.__name__:  # 1x1: oneDNN's way to a product
            self.products += 2 * args[0].numel() * len(args[1])
        return result


def test_the_matrix_of_scores_is_never_there() -> None:
    n, width = 4096, 16
    image, text = inputs(n, width, dtype=torch.float32)
    with Watch() as seen:
        contrastive_loss(image, text, log_scale_of(dtype=torch.float32)).loss.backward()
    assert seen.largest == tiles.TILE_ROWS * tiles.TILE_COLUMNS < n * n / 16


@pytest.mark.parametrize("n", [1024, 4096])
def test_three_matrix_products_less_what_is_kept(n: int) -> None:
    width = 32
    image, text = inputs(n, width, dtype=torch.float32)
    with Watch() as seen:
        contrastive_loss(image, text, log_scale_of(dtype=torch.float32)).loss.backward()
    cached = min(n * n, tiles.CACHED_TILES * tiles.TILE_ROWS * tiles.TILE_COLUMNS)
    assert seen.products == (3 * n * n - cached) * 2 * width


def test_scale_of_what_underflows() -> None:
    """What one shift leaves out of a sum is less than float32 can tell from it."""
    assert math.exp(-87 - tiles.WINDOW_LOW) * 2**17 < torch.finfo(torch.float32).eps
    assert tiles.WINDOW_HIGH + math.log(2**17) < 88.7
