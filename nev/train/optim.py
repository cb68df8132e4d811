"""The optimiser and its schedule: AdamW, linear warm-up, cosine. The learning rate is a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from nev.config import Optim


def make_optimizer(model: nn.Module, config: Optim) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that want a gradient.

    Weight decay is for matrices alone: biases, norms and the logit scale (fewer than two dimensions) have none.
    """
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decays = [
        ([p for p in wanted if p.ndim >= 2], config.weight_decay),
        ([p for p in wanted if p.ndim == 1], 0.0),
        ([p for p in wanted if p.ndim == 0], 0.0),  # apart, because FSDP splits the others and not these
    ]
    groups = [{"params": parameters, "weight_decay": decay} for parameters, decay in decays if parameters]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, total_steps: int, config: Optim) -> float:
    """The rate of step `step` (from 0): up linearly over `warmup_steps`, then by cosine to `final_lr` at `total_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
