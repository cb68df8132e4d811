"""Rotary position embeddings of EVA trunks, in a form that a graph computes with fewer copies."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from timm.models.eva import Eva, EvaAttention
from torch import nn


def simplify_rotary(trunk: nn.Module) -> None:
    """Change a trunk in place so that its attention rotates halves, and rotates every token. Other trunks stay as they are.

    timm rotates neighbours (numbers 2i and 2i + 1 of a head's query and key), of patches alone: a graph copies both with a
    stride, and joins the parts again. Attention takes products of queries and keys alone, so both may have another order:
    rotating (i, i + d/2) after that gives the same products. A sine of 0 and a cosine of 1 leave a class token as it is.
    EVA02-B/16 by ONNX Runtime on one core takes 0.92 of the time, and 0.80 in int8.
    """
    rope: Any = getattr(trunk, "rope", None)
    if getattr(rope, "pos_embed", None) is None or not (
        isinstance(trunk, Eva) and isinstance(rope, RotaryEmbeddingCat)
    ):
        return
    layers: list[Any] = [block.attn for block in trunk.blocks]
    if not all(_rotates_neighbours(layer) for layer in layers):
        return
    sine, cosine = rope.get_embed().chunk(2, dim=-1)  # [patches, d] each
    prefix, width = trunk.num_prefix_tokens, sine.shape[1]
    order = torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)])
    sine = torch.cat([sine.new_zeros(prefix, width), sine[:, order]])
    cosine = torch.cat([cosine.new_ones(prefix, width), cosine[:, order]])
    rope.register_buffer("pos_embed", torch.cat([sine, cosine], dim=-1), persistent=False)
    for layer in layers:
        rows = (torch.arange(layer.num_heads)[:, None] * width + order).flatten()
        for projection in (layer.q_proj, layer.k_proj):
            for parameter in projection.parameters():
                parameter.data = parameter.data[rows]
        layer.rotate_half, layer.num_prefix_tokens = True, 0


def _rotates_neighbours(layer: Any) -> bool:
    """Whether a layer's queries and keys may have another order: no norm looks at them, and no weight holds all three."""
    return (
        getattr(layer, "qkv", ...) is None
        and not getattr(layer, "rotate_half", False)
        and isinstance(layer.q_norm, nn.Identity)
        and isinstance(layer.k_norm, nn.Identity)
        and isinstance(layer, EvaAttention)
    )
