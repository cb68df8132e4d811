"""The text tower as a layer: token ids to unit vectors, with a graph. What a run embeds texts with that has no sidecars.

    tokens [b, T] -> transformer -> mean or CLS -> (LayerNorm) -> L2, the last two in fp32

`nev.models.text.TextTower` is the same recipe around sentences, without a graph; both pool by `pool_tokens`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nev.config.base import ConfigError


class TextEncoder(nn.Module):
    """Token ids to unit vectors. Make it with `make_text_encoder`.

    Attributes: `model` (transformers), `pooling` ("mean" or "cls"), `layer_norm` (without affine), `pad` (the id of padding).
    """

    def __init__(self, model: nn.Module, pooling: str, layer_norm: bool, pad: int) -> None:
        super().__init__()
        self.model, self.pooling, self.layer_norm, self.pad = model, pooling, layer_norm, pad

    def forward(self, tokens: Tensor) -> Tensor:
        """int [b, T], -1 after the end of a text -> float32 [b, width] of unit length."""
        mask = tokens >= 0
        mask[:, 0] = True  # a row without text goes through, too, and attention over nothing would be NaN
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
    """Let it be trained, dropout as its own config has it.

    few_activations: keep less for the backward, compute it again. Raises ConfigError for an architecture that cannot do so.
    """
    encoder.requires_grad_(True).train()
    encoder(torch.zeros(1, 2, dtype=torch.int32)).sum().backward()
    for parameter in encoder.parameters():
        parameter.requires_grad_(parameter.grad is not None)  # one that no loss reaches would stall DDP
        parameter.grad = None
    if few_activations:
        try:
            encoder.model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        except ValueError as error:
            raise ConfigError(f"train.activation_checkpointing: the text encoder has no way to it ({error})") from error
