"""What a gradient's norm is clipped to, beside a loss that is multiplied by the number of GPUs (contrastors)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.gloo import on_ranks
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from nev.losses.contrastive import contrastive_loss

WORLD, ROWS = 2, 6


def averaged_gradients(loss: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """The mean over the ranks, as DDP makes it."""
    gradients = list(torch.autograd.grad(loss, weights))
    for gradient in gradients:
        dist.all_reduce(gradient)
    return [gradient / WORLD for gradient in gradients]


def contrastors_loss(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """The mean loss of this rank's pairs over the batch of all ranks, gathered with gradients, times the number of ranks.

    Source: contrastors, models/dual_encoder/modeling_dual_encoder.py.
    """
    images, texts = (torch.cat(all_gather(side.contiguous())) for side in (image, text))
    labels = torch.arange(ROWS) + dist.get_rank() * ROWS
    scale = log_scale.exp()
    both = F.cross_entropy(scale * image @ texts.T, labels) + F.cross_entropy(scale * text @ images.T, labels)
    return both / 2 * WORLD


def own_loss(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    return contrastive_loss(image, text, log_scale).loss


def gradients_of_both(rank: int) -> list[list[Tensor]]:
    torch.manual_seed(0)
    weight = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    log_scale = torch.tensor(2.66, dtype=torch.float64, requires_grad=True)
    pictures, texts = torch.randn(WORLD, ROWS, 8, dtype=torch.float64), torch.randn(WORLD, ROWS, 4, dtype=torch.float64)
    text, gradients = F.normalize(texts[rank], dim=1), []
    for compute in (own_loss, contrastors_loss):
        image = F.normalize(pictures[rank] @ weight.T, dim=1)
        gradients.append(averaged_gradients(compute(image, text, log_scale), [weight, log_scale]))
    return gradients


def clip(gradients: list[Tensor], limit: float) -> tuple[float, list[Tensor]]:
    """The norm before, and the clipped gradients."""
    weights = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.clone()
    norm = float(torch.nn.utils.clip_grad_norm_(weights, limit))
    return norm, [weight.grad for weight in weights if weight.grad is not None]


def test_a_limit_of_1_there_is_1_by_w_here(tmp_path: Path) -> None:
    """Their gradients are W times those of the mean loss, so their limit divided by W clips the same steps alike."""
    for ours, theirs in on_ranks(gradients_of_both, WORLD, tmp_path):
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(other, WORLD * mine, rtol=1e-12, atol=0)
        limit = 0.8 * clip(theirs, 1e9)[0]  # of a norm above the limit
        norm, theirs_clipped = clip(theirs, limit)
        own_norm, clipped = clip(ours, limit / WORLD)
        assert norm == pytest.approx(WORLD * own_norm, rel=1e-12)
        for mine, other, before in zip(clipped, theirs_clipped, ours, strict=True):
            torch.testing.assert_close(other, WORLD * mine, rtol=1e-5, atol=0)
            assert (mine.abs() < before.abs()).all()
        _, unclipped = clip(ours, limit)  # the same number would clip nothing here
        for mine, before in zip(unclipped, ours, strict=True):
            assert torch.equal(mine, before)
