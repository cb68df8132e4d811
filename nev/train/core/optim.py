"""The optimiser: AdamW, with weight decay for matrices alone."""

from __future__ import annotations

import torch
from torch import nn

from nev.config.train import Optim


def make_optimizer(model: nn.Module, config: Optim) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that require a gradient.

    Only matrices have weight decay: biases, norms and the logit scale (fewer than two dimensions) have none. The learning rate
    of the text tower is multiplied by `text_lr_ratio`.
    """
    groups: dict[tuple[float, int], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ratio = config.text_lr_ratio if name.startswith("text.") else 1.0
            # 0-d parameters have a group of their own: FSDP splits vectors, and leaves 0-d parameters whole.
            groups.setdefault((ratio, min(parameter.ndim, 2)), []).append(parameter)
    param_groups = [
        {"params": parameters, "weight_decay": config.weight_decay if dims == 2 else 0.0, "lr_ratio": ratio}
        for (ratio, dims), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]
    optimizer = torch.optim.AdamW(param_groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    set_learning_rate(optimizer, config.lr)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group: `rate` times the group's `lr_ratio`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]
