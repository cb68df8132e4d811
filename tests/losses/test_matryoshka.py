"""The losses at nested widths against a loss a width, differentiated by autograd: alone and over 1, 2 and 4 processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.gloo import on_ranks
from helpers.losses import MASKS, N, bias_of, gradients, inputs, log_scale_of, naive_sigmoid
from helpers.losses import naive as naive_softmax
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from nev.losses import matryoshka, tiles
from nev.losses.contrastive import contrastive_loss
from nev.losses.matryoshka import matryoshka_loss
from nev.ops.onednn import add_product, product

DIM = 6
WIDTHS = {2: 0.5, 3: 1.0, DIM: 2.0}


def naive(
    image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor | None, valid: Tensor, widths: dict[int, float]
) -> Tensor:
    total = torch.zeros((), dtype=image.dtype)
    if not valid.any():
        return total
    for width, weight in widths.items():
        x, t = (normalize(one[valid][:, :width]) for one in (image, text))
        every = torch.ones(len(x), dtype=torch.bool)
        loss = naive_softmax(x, t, log_scale) if bias is None else naive_sigmoid(x, t, log_scale, bias, every)
        total = total + weight * loss
    return total


@given(
    mask=st.lists(st.booleans(), min_size=1, max_size=24),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    widths=st.dictionaries(st.integers(1, DIM - 1), st.floats(0.1, 3), max_size=3),
    scale=st.floats(0.1, 100),
    seed=st.integers(0, 999),
    sigmoid=st.booleans(),
    asked=st.booleans(),
)
def test_any_tiles_and_widths_give_the_naive_loss(
    mask: list[bool],
    shape: tuple[int, int],
    widths: dict[int, float],
    scale: float,
    seed: int,
    sigmoid: bool,
    asked: bool,
) -> None:
    valid, widths = torch.tensor(mask), {DIM: 0.7, **widths}
    image, text = inputs(len(mask), DIM, seed)
    bias = bias_of(-3.0) if sigmoid else None
    leaves = image, text.requires_grad_(), log_scale_of(scale), *((bias,) if bias is not None else ())
    want = naive(image, text, leaves[2], bias, valid, widths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_ROWS", shape[0])
        patch.setattr(tiles, "TILE_COLUMNS", shape[1])
        if not asked:  # a GPU's way
            patch.setattr(tiles, "is_in_window", lambda shifted, counts: False)
        got = matryoshka_loss(*leaves[:3], widths, bias, valid)
    torch.testing.assert_close(got.loss, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.terms.sum(), want * sum(mask), rtol=1e-9, atol=1e-9)
    if sum(mask) > 1:  # the part of a pair: what its row has, and for softmax half of that and half of its column
        rows = torch.zeros(sum(mask), dtype=image.dtype)
        for width, weight in widths.items():
            x, t = (normalize(one[valid][:, :width].detach()) for one in (image, text))
            scores, pairs = leaves[2].detach().exp() * x @ t.T, torch.arange(sum(mask))
            if bias is None:
                both = cross_entropy(scores, pairs, reduction="none") + cross_entropy(scores.T, pairs, reduction="none")
                rows += weight * both / 2
            else:
                signs = 2 * torch.eye(sum(mask), dtype=scores.dtype) - 1
                rows -= weight * logsigmoid(signs * (scores + bias.detach())).sum(1)
        torch.testing.assert_close(got.terms[valid], rows, rtol=1e-9, atol=1e-9)
    assert not got.terms[~valid].any()
    assert got.pairs.item() == sum(mask)
    if not any(mask):
        assert all(not gradient.any() for gradient in gradients(got.loss, *leaves))
        return
    for ours, theirs in zip(gradients(got.loss, *leaves), gradients(want, *leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    hits = (image[valid] @ text[valid].T).argmax(1) == torch.arange(sum(mask))
    assert got.correct.item() == hits.sum().item()


@pytest.mark.parametrize("sigmoid", [False, True])
def test_invalid_rows_may_hold_anything(sigmoid: bool) -> None:
    image, text = inputs(N, DIM)
    valid = torch.tensor(MASKS["uneven"])
    bias = bias_of() if sigmoid else None
    ends = (bias,) if bias is not None else ()
    leaves = image, text.requires_grad_(), log_scale_of()
    want = gradients(naive(*leaves, bias, valid, WIDTHS), *leaves, *ends)
    dirty = [one.detach().masked_fill(~valid[:, None], torch.nan).requires_grad_() for one in leaves[:2]]
    got = gradients(matryoshka_loss(*dirty, leaves[2], WIDTHS, bias, valid).loss, *dirty, leaves[2], *ends)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_float32_is_near_float64() -> None:
    image, text = inputs(512, 64)
    widths = {8: 1.0, 16: 1.0, 64: 1.0}
    valid = torch.ones(512, dtype=torch.bool)
    want = naive(image, text, log_scale_of(100.0), None, valid, widths)
    found = image.detach().float().requires_grad_()
    got = matryoshka_loss(found, text.float(), log_scale_of(100.0, torch.float32), widths).loss
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    theirs = gradients(want, image)[0]
    assert (gradients(got, found)[0].double() - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The multiplications of each product of tiles."""
    counts: list[int] = []

    def counted(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        counts.append(len(rows) * len(weight) * rows.shape[1])
        return product(rows, weight, bias)

    def counted_sum(total: Tensor, rows: Tensor, weight: Tensor) -> None:
        counts.append(len(rows) * len(weight) * rows.shape[1])
        add_product(total, rows, weight)

    for module in (matryoshka, tiles):
        monkeypatch.setattr(module, "product", counted)
        monkeypatch.setattr(module, "add_product", counted_sum)
    return counts


def test_all_widths_cost_the_products_of_the_widest(multiplied: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "CACHED_TILES", 0)
    image, text = inputs(64, DIM)
    gradients(contrastive_loss(image, text, log_scale_of()).loss, image)
    alone, _ = sum(multiplied), multiplied.clear()
    gradients(matryoshka_loss(image, text, log_scale_of(), WIDTHS).loss, image)
    assert sum(multiplied) == alone == 3 * 64 * 64 * DIM


def test_widths_that_do_not_fit_are_refused() -> None:
    image, text = inputs(8, DIM)
    for widths in ({}, {3: 1.0}, {3: 1.0, DIM: 1.0, DIM + 1: 1.0}, {0: 1.0, DIM: 1.0}):
        with pytest.raises(ValueError, match=rf"widths must be from 1 to D = {DIM} and hold it"):
            matryoshka_loss(image, text, log_scale_of(), widths)


def _worker(rank: int) -> dict[str, list[Tensor]]:
    tiles.TILE_ROWS, tiles.TILE_COLUMNS = 3, 5
    found = {}
    for world in (1, 2, 4):
        group = None if world == 4 else dist.new_subgroups(world)[0]
        rows = slice(rank % world * N // world, (rank % world + 1) * N // world)
        for name, mask in MASKS.items():
            for bias in (None, bias_of()):
                image, text = (one.detach()[rows].requires_grad_() for one in inputs(N, DIM))
                leaves = image, text, log_scale_of(), *(() if bias is None else (bias,))
                got = matryoshka_loss(*leaves[:3], WIDTHS, bias, torch.tensor(mask)[rows], group)
                found[f"{world}/{name}/{bias is not None}"] = [
                    *(one.detach() for one in got),
                    *gradients(got.loss, *leaves),
                ]
    return found


def test_processes_give_what_one_process_gives(tmp_path: Path) -> None:
    ranks = on_ranks(_worker, 4, tmp_path)
    close = {"rtol": 1e-10, "atol": 1e-10}
    for name, mask in MASKS.items():
        for bias in (None, bias_of()):
            image, text = inputs(N, DIM)
            leaves = image, text.requires_grad_(), log_scale_of(), *(() if bias is None else (bias,))
            alone = matryoshka_loss(*leaves[:3], WIDTHS, bias, torch.tensor(mask))
            of_images, of_texts, *of_scalars = gradients(alone.loss, *leaves)
            for world in (1, 2, 4):
                parts = [ranks[rank][f"{world}/{name}/{bias is not None}"] for rank in range(world)]
                for loss, correct, pairs, *_ in parts:
                    torch.testing.assert_close(loss, alone.loss.detach(), **close)
                    assert (correct, pairs) == (alone.correct, alone.pairs)
                torch.testing.assert_close(torch.cat([part[3] for part in parts]), alone.terms, **close)
                for at, want in ((4, of_images), (5, of_texts)):
                    torch.testing.assert_close(torch.cat([part[at] for part in parts]) / world, want, **close)
                for at, want in enumerate(of_scalars, 6):
                    torch.testing.assert_close(sum(part[at] for part in parts) / world, want, **close)
