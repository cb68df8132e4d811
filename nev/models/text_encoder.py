"""The text tower as a layer: token ids to unit vectors, with a graph. Runs without sidecars embed their texts by this layer.

    tokens [b, T] -> transformer -> mean or CLS -> (LayerNorm) -> L2, the last two in fp32

`nev.models.text.TextTower` embeds sentences by the same recipe, without a graph. Both pool by `pool_tokens`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nev.config.base import ConfigError


class TextEncoder(nn.Module):
    """Token ids to unit vectors. `make_text_encoder` makes one.

    model: of transformers.
    pooling: "mean" or "cls".
    layer_norm: LayerNorm without affine after pooling.
    pad: token id of padding.
    """

    def __init__(self, model: nn.Module, pooling: str, layer_norm: bool, pad: int) -> None:
        super().__init__()
        self.model, self.pooling, self.layer_norm, self.pad = model, pooling, layer_norm, pad

    def forward(self, tokens: Tensor) -> Tensor:
        """int [b, T], -1 after the end of a text -> float32 [b, width] of unit length."""
        mask = tokens >= 0
        mask[:, 0] = True  # for a row without text: attention over no token would be NaN
        ids = torch.where(tokens >= 0, tokens, self.pad)
        hidden = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return pool_tokens(hidden, mask, self.pooling, self.layer_norm)


def pool_tokens(hidden: Tensor, mask: Tensor, pooling: str, layer_norm: bool) -> Tensor:
    """The transformer's output [b, T, D] -> float32 [b, D] of unit length. mask: [b, T], 0 or False where there is padding."""
    if pooling == "cls":
        pooled = hidden[:, 0].float()
    else:
        weights = mask.unsqueeze(-1).float()
        pooled = (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    if layer_norm:
        pooled = F.layer_norm(pooled, (pooled.shape[-1],))
    return F.normalize(pooled, dim=-1)


def unlock(encoder: TextEncoder, few_activations: bool) -> None:
    """Make the encoder trainable, with the dropout of its config.

    few_activations: activation checkpointing. Raises ConfigError for an architecture without it.
    """
    encoder.requires_grad_(True).train()
    encoder(torch.zeros(1, 2, dtype=torch.int32)).sum().backward()
    for parameter in encoder.parameters():
        parameter.requires_grad_(parameter.grad is not None)  # DDP would wait for a parameter that no loss reaches
        parameter.grad = None
    if few_activations:
        try:
            encoder.model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        except ValueError as error:
            raise ConfigError(
                f"train.activation_checkpointing: the text encoder does not support it ({error})"
            ) from error
