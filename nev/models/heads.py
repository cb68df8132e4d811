"""Pooling heads: tokens of a trunk, [b, T, D] -> one vector an image, [b, D].

`nomic` is the head of nomic-embed-vision-v1.5 (arXiv 2406.18587; `NomicMultiHeadAttentionPooling` in the released
modelling code). It differs from the usual MAP (`AttentionPoolLatent` of timm, Zhai et al. 2022): the residual is the
class token and not the attention's output, and the MLP is a gated one.
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
from nev.config.experiment import Vision

INIT_STD = 0.02  # `initializer_range` of the released config


class NomicPool(nn.Module):
    """embedding = CLS + MLP(LN(attention(latent, tokens))), with one learned latent as the query.

    The released code adds the MLP's one row to every token and then reads token 0, which is this.

    Args:
        dim: width D of the tokens.
        heads: attention heads; must divide D.
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
    """The mean of the patch tokens; the `prefix` class and register tokens before them are left out."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, T, D] -> [b, D]."""
        return tokens[:, self.prefix :].mean(dim=1)


def build_head(config: Vision, trunk: Any) -> nn.Module:
    """The head that `config.pool` names, sized for `trunk` (a timm model: `num_features` wide).

    Heads default to the trunk's own number; the hidden width of `nomic` to 8/3 D in steps of 8 (2,048 for 768) and
    that of `map` to 4 D. Raises ConfigError where the trunk has no class token to pool, or the heads do not divide D.
    """
    dim = int(trunk.num_features)
    if config.pool in ("nomic", "cls") and getattr(trunk, "cls_token", None) is None:
        raise ConfigError(
            f"vision.pool {config.pool!r} reads the class token, and trunk {config.trunk!r} has none: "
            "use pool map or mean, or trunk_args {class_token: true} on a ViT"
        )
    if config.pool == "cls":
        return ClsPool()
    if config.pool == "mean":
        return MeanPool(int(getattr(trunk, "num_prefix_tokens", 0)))
    heads = config.pool_heads or _trunk_heads(trunk, dim)
    if dim % heads:
        raise ConfigError(f"vision.pool_heads ({heads}) must divide the width of trunk {config.trunk!r} ({dim})")
    if config.pool == "nomic":
        return NomicPool(dim, heads, config.pool_hidden or 8 * round(dim / 3))
    hidden = config.pool_hidden or 4 * dim
    norm: Any = partial(nn.LayerNorm, eps=1e-6)
    # timm truncates dim * mlp_ratio; half a unit more makes it exactly `hidden`.
    pool: nn.Module = AttentionPoolLatent(dim, num_heads=heads, mlp_ratio=(hidden + 0.5) / dim, norm_layer=norm)
    return pool


def _trunk_heads(trunk: Any, dim: int) -> int:
    """Attention heads of the trunk's last block, else heads of 64 as usual in ViTs."""
    blocks = getattr(trunk, "blocks", None)
    own = getattr(getattr(blocks[-1], "attn", None), "num_heads", None) if blocks is not None and len(blocks) else None
    return int(own) if own else max(1, dim // 64)
