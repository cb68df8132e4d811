"""The contrastive loss against a naive reference, alone and over 1, 2 and 4 processes."""

import math
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from helpers.gloo import on_ranks
from helpers.losses import DIM, MASKS, WIDTH, N, gradients, inputs, log_scale_of, naive
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.nn.parallel import DistributedDataParallel

from nev.losses import tiles
from nev.losses.contrastive import contrastive_loss

COLLECTIVES = ("all_gather_into_tensor", "all_gather", "all_reduce", "reduce_scatter_tensor", "broadcast", "all_to_all")


# One process


@settings(max_examples=60, deadline=None)
@given(
    mask=st.lists(st.booleans(), min_size=1, max_size=24),
    dim=st.integers(1, 12),
    scale=st.floats(0.1, 100),
    seed=st.integers(0, 999),
)
def test_equals_the_naive_loss_on_the_valid_rows(mask: list[bool], dim: int, scale: float, seed: int) -> None:
    mask[seed % len(mask)] = True
    valid = torch.tensor(mask)
    image, text = inputs(len(mask), dim, seed)
    log_scale = log_scale_of(scale)
    want = naive(image, text, log_scale, valid)
    got = contrastive_loss(image, text, log_scale, valid)
    torch.testing.assert_close(got.loss, want, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(gradients(got.loss, image, log_scale), gradients(want, image, log_scale), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    hits = (image[valid] @ text[valid].T).argmax(1) == torch.arange(sum(mask))
    assert (got.pairs.item(), got.correct.item()) == (sum(mask), hits.sum().item())
    assert not got.pairs.requires_grad
    assert not got.correct.requires_grad


def test_gradcheck() -> None:
    image, text = inputs(6, 4)
    valid = torch.tensor([True, True, False, True, True, True])
    assert torch.autograd.gradcheck(
        lambda x, scale: contrastive_loss(x, text, scale, valid).loss, (image, log_scale_of(3.0))
    )
    assert torch.autograd.gradcheck(
        lambda x, t, scale: contrastive_loss(x, t, scale, valid).loss, (image, text.requires_grad_(), log_scale_of(3.0))
    )


def test_gradient_is_scaled_by_what_comes_after_the_loss() -> None:
    image, text = inputs()
    once = gradients(contrastive_loss(image, text, log_scale_of()).loss, image)[0]
    thrice = gradients(3 * contrastive_loss(image, text, log_scale_of()).loss, image)[0]
    torch.testing.assert_close(thrice, 3 * once)


def test_invalid_rows_may_hold_anything() -> None:
    image, text = inputs()
    valid = torch.tensor(MASKS["uneven"])
    log_scale = log_scale_of()
    want = contrastive_loss(image[valid], text[valid], log_scale)
    want_image, want_scale = gradients(want.loss, image, log_scale)

    dirty_text = text.masked_fill(~valid[:, None], torch.nan)
    dirty_image = image.detach().masked_fill(~valid[:, None], torch.inf).requires_grad_()
    before = dirty_text.clone()
    got = contrastive_loss(dirty_image, dirty_text, log_scale, valid)
    got_image, got_scale = gradients(got.loss, dirty_image, log_scale)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_image, want_image, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_scale, want_scale, rtol=1e-12, atol=1e-12)
    assert torch.all(got_image[~valid] == 0)
    assert torch.equal(dirty_text.nan_to_num(), before.nan_to_num())  # the caller's tensor is left alone


def test_no_valid_row_gives_zero() -> None:
    image, text = inputs()
    log_scale = log_scale_of()
    got = contrastive_loss(image, text, log_scale, torch.zeros(N, dtype=torch.bool))
    assert (got.loss.item(), got.correct.item(), got.pairs.item()) == (0, 0, 0)
    for gradient in gradients(got.loss, image, log_scale):
        assert torch.all(gradient == 0)


def test_nan_in_a_valid_row_is_not_hidden() -> None:
    image, text = inputs()
    with torch.no_grad():
        image[3, 0] = torch.nan
    assert torch.isnan(contrastive_loss(image, text, log_scale_of()).loss)


def test_collapsed_embeddings_score_one_of_n() -> None:
    same = normalize(torch.ones(N, DIM))
    got = contrastive_loss(same, same, log_scale_of(dtype=torch.float32))
    assert got.correct.item() == 1
    assert got.loss.item() == pytest.approx(math.log(N), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_accumulated_in_float32(dtype: torch.dtype) -> None:
    image, text = inputs(256, 32, dtype=dtype)
    log_scale = log_scale_of(100.0, torch.float32)
    exact_image = image.detach().double().requires_grad_()
    want = naive(exact_image, text.double(), log_scale.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = contrastive_loss(image, text, log_scale)
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss.double(), want, rtol=1e-5, atol=1e-5)
    image_gradient, scale_gradient = gradients(got.loss, image, log_scale)
    want_image, want_scale = gradients(want, exact_image, log_scale)
    assert image_gradient.dtype == dtype
    torch.testing.assert_close(image_gradient.double(), want_image, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(scale_gradient, want_scale, rtol=1e-4, atol=1e-6)


def test_fp16_gradients_smaller_than_fp16_survive_a_loss_scaler() -> None:
    image, text = inputs(64, 16, dtype=torch.float16)
    log_scale = log_scale_of(1e-3, torch.float32)
    loss = contrastive_loss(image, text, log_scale).loss
    scaled = gradients(loss * 2.0**16, image)[0].double() / 2.0**16
    exact = image.detach().double().requires_grad_()
    want = gradients(naive(exact, text.double(), log_scale.double()), exact)[0]
    torch.testing.assert_close(scaled, want, rtol=1e-2, atol=1e-8)


def test_same_numbers_twice_and_without_gradients() -> None:
    image, text = inputs(dtype=torch.float32)
    first, second = (contrastive_loss(image, text, log_scale_of(dtype=torch.float32)) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(gradients(first.loss, image)[0], gradients(second.loss, image)[0])
    with torch.no_grad():
        still = contrastive_loss(image, text, log_scale_of(dtype=torch.float32))
    assert torch.equal(still.loss, first.loss)
    assert not still.loss.requires_grad


def test_needs_neither_ray_nor_a_process_group() -> None:
    code = "import sys, nev.losses.contrastive; print(sorted({'ray', 'timm', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# 1, 2 and 4 processes


class Tower(torch.nn.Module):
    """A vision tower in little: a linear map to unit vectors, and the learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, DIM)
        self.log_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return normalize(self.linear(pixels)), self.log_scale + 0


def tower() -> Tower:
    generator = torch.Generator().manual_seed(3)
    made = Tower().double()
    with torch.no_grad():
        made.linear.weight.copy_(torch.randn(DIM, WIDTH, generator=generator))
        made.linear.bias.copy_(torch.randn(DIM, generator=generator))
    return made


def pixels() -> Tensor:
    return torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def _share(rank: int, world: int, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """What this rank gets for its rows of the batch: loss, counts, gradients of inputs and of a tower under DDP."""
    got: dict[str, Tensor] = {}
    rows = slice(rank * N // world, (rank + 1) * N // world)
    for name, mask in MASKS.items():
        image, text = inputs()
        image = image.detach()[rows].requires_grad_()
        log_scale = log_scale_of()
        valid = torch.tensor(mask)[rows]
        result = contrastive_loss(image, text[rows], log_scale, valid, group)
        got |= {f"{name}/{key}": item.detach() for key, item in result._asdict().items()}
        got[f"{name}/image"], got[f"{name}/scale"] = gradients(result.loss, image, log_scale)
        free = text[rows].clone().requires_grad_()
        unlocked = contrastive_loss(image, free, log_scale, valid, group).loss
        got[f"{name}/both/image"], got[f"{name}/both/text"] = gradients(unlocked, image, free)

        model = DistributedDataParallel(tower(), process_group=group)
        image, log_scale = model(pixels()[rows])
        contrastive_loss(image, text[rows], log_scale, valid, group).loss.backward()
        for key, parameter in model.module.named_parameters():
            got[f"{name}/ddp/{key}"] = parameter.grad
    return got


def _count(group: dist.ProcessGroup | None, locked: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Collectives of one forward, and of its backward."""
    calls: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str):
        def call(*args, **kwargs):
            calls[name] += 1
            return originals[name](*args, **kwargs)

        return call

    image, text = inputs(4)
    text.requires_grad_(not locked)
    try:
        for name in COLLECTIVES:
            setattr(dist, name, counting(name))
        loss = contrastive_loss(image, text, log_scale_of(), group=group).loss
        forward = dict(calls)
        calls.clear()
        loss.backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return forward, dict(calls)


def _worker(rank: int) -> dict:
    """Four processes; two pairs of them, and each alone, are process groups of their own."""
    tiles.TILE_ROWS, tiles.TILE_COLUMNS = 3, 5  # so that pairs lie on, and across, the borders of tiles
    results = {}
    for world in (1, 2, 4):
        group = None if world == 4 else dist.new_subgroups(world)[0]
        results[world] = _share(rank % world, world, group)
        if world > 1:
            results[world]["collectives"] = _count(group, locked=True)
            results[world]["collectives unlocked"] = _count(group, locked=False)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return on_ranks(_worker, 4, tmp_path_factory.mktemp("gloo"))


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    """The naive loss of the whole batch in one process."""
    want: dict[str, Tensor] = {}
    for name, mask in MASKS.items():
        valid = torch.tensor(mask)
        image, text = inputs()
        log_scale, model = log_scale_of(), tower()
        alone = contrastive_loss(image, text, log_scale, valid)
        want |= {
            f"{name}/correct": alone.correct,
            f"{name}/pairs": alone.pairs,
            f"{name}/terms": torch.zeros(N).double(),
        }
        if any(mask):
            rows = cross_entropy(
                log_scale.exp() * image[valid] @ text[valid].T, torch.arange(sum(mask)), reduction="none"
            )
            columns = cross_entropy(
                log_scale.exp() * text[valid] @ image[valid].T, torch.arange(sum(mask)), reduction="none"
            )
            want[f"{name}/terms"][valid] = (rows + columns).detach() / 2
        loss = naive(image, text, log_scale, valid) if any(mask) else (image * 0).sum() + log_scale * 0
        want[f"{name}/loss"] = loss.detach()
        want[f"{name}/image"], want[f"{name}/scale"] = gradients(loss, image, log_scale)
        free = text.clone().requires_grad_()
        both = naive(image, free, log_scale, valid) if any(mask) else (free * 0).sum()
        want[f"{name}/text"] = gradients(both, free)[0]
        image, log_scale = model(pixels())
        loss = naive(image, text, log_scale, valid) if any(mask) else (image * 0).sum() + log_scale * 0
        loss.backward()
        for key, parameter in model.named_parameters():
            want[f"{name}/ddp/{key}"] = parameter.grad
    return want


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("mask", MASKS)
def test_processes_give_what_one_process_gives(ranks: list[dict], whole: dict, world: int, mask: str) -> None:
    close = {"rtol": 1e-12, "atol": 1e-12}
    for name in ("loss", "correct", "pairs", "ddp/linear.weight", "ddp/linear.bias", "ddp/log_scale"):
        for rank in range(world):  # DDP's mean over ranks is the gradient of the whole batch, on every rank
            torch.testing.assert_close(ranks[rank][world][f"{mask}/{name}"], whole[f"{mask}/{name}"], **close)
    parts = [ranks[rank][world] for rank in range(world)]
    torch.testing.assert_close(torch.cat([part[f"{mask}/image"] for part in parts]) / world, whole[f"{mask}/image"])
    terms = torch.cat([part[f"{mask}/terms"] for part in parts])
    torch.testing.assert_close(terms, whole[f"{mask}/terms"], **close)
    torch.testing.assert_close(terms.sum(), whole[f"{mask}/loss"] * whole[f"{mask}/pairs"], **close)
    torch.testing.assert_close(sum(part[f"{mask}/scale"] for part in parts) / world, whole[f"{mask}/scale"])
    for side in ("image", "text"):  # of unlocked texts
        both = torch.cat([part[f"{mask}/both/{side}"] for part in parts]) / world
        torch.testing.assert_close(both, whole[f"{mask}/{side}"])
    assert all(torch.equal(part[f"{mask}/loss"], parts[0][f"{mask}/loss"]) for part in parts)


@pytest.mark.parametrize("world", [2, 4])
def test_three_collectives_forward_one_more_for_unlocked_texts_and_none_backward(ranks: list[dict], world: int) -> None:
    for rank in range(world):
        forward = {"all_gather_into_tensor": 1, "all_reduce": 2}
        assert ranks[rank][world]["collectives"] == (forward, {})
        assert ranks[rank][world]["collectives unlocked"] == (forward | {"reduce_scatter_tensor": 1}, {})
