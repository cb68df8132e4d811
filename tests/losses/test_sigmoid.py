"""The sigmoid loss against SigLIP's own formula, alone and over 1, 2 and 4 processes, the texts locked or not."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.gloo import on_ranks
from helpers.losses import MASKS, N, bias_of, gradients, inputs, log_scale_of
from helpers.losses import naive_sigmoid as naive
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid

from nev.losses import tiles
from nev.losses.sigmoid import sigmoid_loss


@given(
    mask=st.lists(st.booleans(), min_size=1, max_size=24),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    scale=st.floats(0.1, 100),
    bias=st.floats(-60, 60),
    seed=st.integers(0, 999),
)
def test_any_tiles_give_the_naive_loss(
    mask: list[bool], shape: tuple[int, int], scale: float, bias: float, seed: int
) -> None:
    valid = torch.tensor(mask)
    image, text = inputs(len(mask), 5, seed)
    leaves = image, text.requires_grad_(), log_scale_of(scale), bias_of(bias)
    want = naive(*leaves, valid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_ROWS", shape[0])
        patch.setattr(tiles, "TILE_COLUMNS", shape[1])
        got = sigmoid_loss(*leaves, valid)
    torch.testing.assert_close(got.loss, want, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(gradients(got.loss, *leaves), gradients(want, *leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    hits = (image[valid] @ text[valid].T).argmax(1) if any(mask) else torch.empty(0)
    assert got.correct.item() == (hits == torch.arange(sum(mask))).sum().item()
    assert got.pairs.item() == sum(mask)
    scores = leaves[2].exp() * image[valid] @ text[valid].T + leaves[3]
    signs = 2 * torch.eye(sum(mask), dtype=scores.dtype) - 1
    torch.testing.assert_close(got.terms[valid], -logsigmoid(signs * scores).sum(1).detach(), rtol=1e-10, atol=1e-10)
    assert not got.terms[~valid].any()


def test_invalid_rows_may_hold_anything() -> None:
    image, text = inputs()
    valid = torch.tensor(MASKS["uneven"])
    leaves = image, text.requires_grad_(), log_scale_of(10.0), bias_of()
    want = gradients(naive(*leaves, valid), *leaves)
    dirty = [one.detach().masked_fill(~valid[:, None], torch.nan).requires_grad_() for one in leaves[:2]]
    got = gradients(sigmoid_loss(*dirty, *leaves[2:], valid).loss, *dirty, *leaves[2:])
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [-10.0, 0.0, 10.0])
def test_float32_is_near_float64(bias: float) -> None:
    image, text = inputs(512, 16)
    want = naive(image, text, log_scale_of(10.0), bias_of(bias), torch.ones(512, dtype=torch.bool))
    found = image.detach().float().requires_grad_()
    got = sigmoid_loss(found, text.float(), log_scale_of(10.0, torch.float32), bias_of(bias).float()).loss
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    theirs = gradients(want, image)[0]
    assert (gradients(got, found)[0].double() - theirs).abs().max() <= 4e-6 * theirs.abs().max()


def test_a_bias_must_be_one_number() -> None:
    image, text = inputs()
    with pytest.raises(ValueError, match=r"bias must be 0-d, not \[1\]"):
        sigmoid_loss(image, text, log_scale_of(), bias_of()[None])


def _worker(rank: int) -> dict[str, list[Tensor | None]]:
    tiles.TILE_ROWS, tiles.TILE_COLUMNS = 3, 5
    found = {}
    for world in (1, 2, 4):
        group = None if world == 4 else dist.new_subgroups(world)[0]
        rows = slice(rank % world * N // world, (rank % world + 1) * N // world)
        for name, mask in MASKS.items():
            image, text = (one.detach()[rows].requires_grad_() for one in inputs())
            leaves = image, text, log_scale_of(10.0), bias_of()
            got = sigmoid_loss(*leaves, torch.tensor(mask)[rows], group)
            found[f"{world}/{name}"] = [*(one.detach() for one in got), *gradients(got.loss, *leaves)]
    return found


def test_processes_give_what_one_process_gives(tmp_path: Path) -> None:
    ranks = on_ranks(_worker, 4, tmp_path)
    close = {"rtol": 1e-12, "atol": 1e-12}
    for name, mask in MASKS.items():
        image, text = inputs()
        leaves = image, text.requires_grad_(), log_scale_of(10.0), bias_of()
        valid = torch.tensor(mask)
        want = naive(*leaves, valid)
        wanted = gradients(want, *leaves)
        alone = sigmoid_loss(*leaves, valid)
        for world in (1, 2, 4):
            parts = [ranks[rank][f"{world}/{name}"] for rank in range(world)]
            for loss, correct, pairs, *_ in parts:
                torch.testing.assert_close(loss, want.detach(), **close)
                assert (correct, pairs) == (alone.correct, alone.pairs)
            terms = torch.cat([part[3] for part in parts])
            torch.testing.assert_close(terms, alone.terms, **close)
            torch.testing.assert_close(terms.sum(), want.detach() * alone.pairs, **close)
            assert not terms[~valid].any()
            for number in (4, 5):  # image, text
                torch.testing.assert_close(
                    torch.cat([part[number] for part in parts]) / world, wanted[number - 4], **close
                )
            for number in (6, 7):  # scale, bias: DDP takes the mean over ranks
                torch.testing.assert_close(sum(part[number] for part in parts) / world, wanted[number - 4], **close)
