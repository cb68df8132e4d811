"""Inputs of the losses, and the losses written out naively."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

N, WIDTH, DIM = 16, 5, 7


MASKS = {
    "all": [True] * N,
    "uneven": [False, True, True, False, True, True, False, True] + [True] * 8,
    "one rank of 4 empty": [True] * 4 + [False] * 4 + [True] * 8,
    "one rank of 2 empty": [False] * 8 + [True] * 8,
    "none": [False] * N,
}


def naive(image: Tensor, text: Tensor, log_scale: Tensor, valid: Tensor | None = None) -> Tensor:
    """What CLIP's pseudocode does, on the valid pairs alone, differentiated by autograd."""
    if valid is not None:
        image, text = image[valid], text[valid]
    logits = log_scale.exp() * image @ text.T
    target = torch.arange(len(image))
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def inputs(n: int = N, dim: int = DIM, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64)) for _ in range(2))
    return image.to(dtype).requires_grad_(), text.to(dtype)


def log_scale_of(scale: float = 1 / 0.07, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(math.log(scale), dtype=dtype, requires_grad=True)


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


def bias_of(value: float = -10.0) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def naive_sigmoid(image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor, valid: Tensor) -> Tensor:
    """Algorithm 1 of the paper, on the valid pairs alone."""
    image, text = image[valid], text[valid]
    logits = log_scale.exp() * image @ text.T + bias
    signs = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -logsigmoid(signs * logits).sum() / max(1, len(image))
