"""The optimiser: AdamW, with weight decay for the matrices and kernels of layers alone."""

from __future__ import annotations

import torch
from torch import nn

from nev.config.train import Optim


def make_optimizer(model: nn.Module, config: Optim) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that require a gradient.

    Only matrices and kernels of layers have weight decay: biases, norms and the logit scale have none, and neither have class
    tokens, latents and positions, as timm's `no_weight_decay` has it. The learning rate of the text tower is multiplied by
    `text_lr_ratio`.
    """
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ratio = config.text_lr_ratio if name.startswith("text.") else 1.0
            # 0-d parameters have a group of their own: FSDP splits vectors, and leaves 0-d parameters whole.
            key = ratio, has_weight_decay(name, parameter), parameter.ndim > 0
            groups.setdefault(key, []).append(parameter)
    param_groups = [
        {"params": parameters, "weight_decay": config.weight_decay if decayed else 0.0, "lr_ratio": ratio}
        for (ratio, decayed, _), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]
    optimizer = torch.optim.AdamW(param_groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    set_learning_rate(optimizer, config.lr)
    return optimizer


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is the matrix or the kernel of a layer. Tokens, latents and positions are no layer's `weight`."""
    return parameter.ndim > 1 and name.endswith("weight") and "position_embedding" not in name


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group: `rate` times the group's `lr_ratio`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]
