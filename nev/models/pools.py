"""Pools: tokens of a trunk, [b, T, D] -> one vector per image, [b, D].

`nomic` is the pooling head of nomic-embed-vision-v1.5 (arXiv 2406.18587; `NomicMultiHeadAttentionPooling` in the released
modelling code). It differs from the usual MAP (`AttentionPoolLatent` of timm, Zhai et al. 2022) in two points: the residual
is the class token instead of the attention's output, and the MLP is gated.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.mlp import SwiGLU
from timm.layers.weight_init import trunc_normal_tf_
from torch import Tensor, nn

from nev.config.base import ConfigError
from nev.config.model import Vision

INIT_STD = 0.02  # `initializer_range` of the released config


class NomicPool(nn.Module):
    """embedding = CLS + MLP(LN(attention(latent, tokens))), with one learned latent as the query.

    The released code adds the single row of the MLP to every token and then reads token 0, which is the same.

    dim: width D of the tokens.
    heads: number of attention heads; must divide D.
    hidden: width of the gated SiLU MLP, fc2(fc1_x(y) * silu(fc1_g(y))).
    """

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim, hidden)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)
        trunc_normal_tf_(self.latent, std=dim**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, T, D] with the class token first -> [b, D]."""
        rows, count, dim = tokens.shape
        query = self.q(self.latent).view(1, 1, self.heads, -1).transpose(1, 2).expand(rows, -1, -1, -1)
        key, value = self.kv(tokens).view(rows, count, 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        pooled = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(rows, dim)
        embedding: Tensor = tokens[:, 0] + self.mlp(self.norm(self.proj(pooled)))
        return embedding


class ClsPool(nn.Module):
    """The class token."""

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, T, D] with the class token first -> [b, D]."""
        return tokens[:, 0]


class MeanPool(nn.Module):
    """The mean of the patch tokens. prefix: number of class and register tokens before them, which are left out."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, T, D] -> [b, D]."""
        return tokens[:, self.prefix :].mean(dim=1)


class ClsMeanPool(nn.Module):
    """The class token, and beside it the mean of the patch tokens (SAIL, arXiv 2412.04616). prefix: as for `MeanPool`."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.mean = MeanPool(prefix)

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, T, D] with the class token first -> [b, 2 D]."""
        return torch.cat([tokens[:, 0], self.mean(tokens)], dim=1)


def has_class_token(trunk: Any) -> bool:
    """Whether the first token of a timm model is a class token."""
    return _count_class_tokens(trunk) > 0 and count_prefix(trunk) > 0


def count_prefix(trunk: Any) -> int:
    """Number of tokens before the patches: class, distillation and register tokens. VOLO, CoaT and PiT do not say theirs."""
    stated = getattr(trunk, "num_prefix_tokens", None)
    return _count_class_tokens(trunk) if stated is None else int(stated)


def _count_class_tokens(trunk: Any) -> int:
    """Tokens of the last parameter `cls_token`, wherever the trunk has it. CoaT has one a stage, PiT's may hold two tokens."""
    found = [tensor for name, tensor in trunk.named_parameters() if name.rpartition(".")[2].startswith("cls_token")]
    return int(found[-1].shape[1]) if found else 0


def build_pool(config: Vision, trunk: Any) -> tuple[nn.Module, int]:
    """Build the pool that `config.pool` names, for a trunk of `build_trunk` whose tokens have width D. Returns (pool, its width).

    The pool `own` is the trunk's: what is built for it passes a vector on.
    The number of attention heads defaults to the trunk's. The hidden width defaults to 8/3 D in steps of 8 (2,048 for 768) for
    `nomic`, and to 4 D for `map`. Raises ConfigError where the trunk has no class token or no patch tokens to pool, or the heads
    do not divide D.
    """
    *count, dim = trunk.output_shape
    if config.pool == "own":
        return nn.Identity(), dim
    prefix = count_prefix(trunk)
    if config.pool in ("nomic", "cls", "cls+mean") and not has_class_token(trunk):
        raise ConfigError(
            f"vision.pool {config.pool!r} reads the class token, and trunk {config.trunk!r} has none: "
            "use pool map, mean or own, or trunk_args {class_token: true} on a ViT"
        )
    if config.pool != "cls" and count[0] <= prefix:
        raise ConfigError(
            f"vision.pool {config.pool!r} reads the patch tokens, and trunk {config.trunk!r} gives its class token alone: "
            "use pool cls or own"
        )
    if config.pool == "cls":
        return ClsPool(), dim
    if config.pool == "mean":
        return MeanPool(prefix), dim
    if config.pool == "cls+mean":
        return ClsMeanPool(prefix), 2 * dim
    heads = config.pool_heads or _trunk_heads(trunk, dim)
    if dim % heads:
        raise ConfigError(f"vision.pool_heads ({heads}) must divide the width of trunk {config.trunk!r} ({dim})")
    if config.pool == "nomic":
        return NomicPool(dim, heads, config.pool_hidden or 8 * round(dim / 3)), dim
    hidden = config.pool_hidden or 4 * dim
    norm: Any = partial(nn.LayerNorm, eps=1e-6)
    # timm truncates dim * mlp_ratio: with 0.5 added the result is exactly `hidden`.
    return AttentionPoolLatent(dim, num_heads=heads, mlp_ratio=(hidden + 0.5) / dim, norm_layer=norm), dim


def _trunk_heads(trunk: Any, dim: int) -> int:
    """Number of attention heads of the trunk's last block; without attention there, heads of width 64, as usual in ViTs.

    Fewer where these do not divide D.
    """
    blocks = getattr(trunk, "blocks", None)
    heads = (
        getattr(getattr(blocks[-1], "attn", None), "num_heads", None) if blocks is not None and len(blocks) else None
    )
    most = int(heads) if heads else max(1, dim // 64)
    return next(count for count in range(most, 0, -1) if dim % count == 0)
