"""The text tower as a layer: token ids to unit vectors, with a graph. What a run embeds texts with that has no sidecars.

    tokens [b, T] -> transformer -> mean or CLS -> (LayerNorm) -> L2, the last two in fp32

`nev.models.text.TextTower` is the same recipe around sentences, without a graph; both pool by `pool_tokens`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from nev.config.base import ConfigError

if TYPE_CHECKING:
    from nev.models.text import TextTower

SAME = 1e-4  # in any number of a unit vector; float noise is 1e-7


class TextEncoder(nn.Module):
    """Token ids to unit vectors. Make it with `encoder_of`.

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


def encoder_of(tower: TextTower) -> TextEncoder:
    """The layer of a tower; it shares the tower's weights. Its inputs are made by `nev.data.tokens`."""
    return TextEncoder(tower.model, tower.pooling, tower.layer_norm, tower.tokenizer.pad_token_id)


def unlock(encoder: TextEncoder, few_activations: bool) -> None:
    """Let it be trained, dropout as its own config has it. few_activations: as `nev.train.tower.keep_few_activations` says.

    Raises ConfigError for an architecture that cannot keep few.
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


def refuse_other_vectors(tower: TextTower, tokens: Callable[[Sequence[str]], NDArray[np.int32]]) -> None:
    """Raise ConfigError unless the layer, on what `tokens` makes of some sentences, gives what the tower gives of them.

    They differ where an architecture wants more than ids and a mask (segment ids other than 0, padding on the left).
    """
    from nev.models.text import CANARIES

    sentences = [*CANARIES, " ".join(map(str, range(tower.max_tokens)))]  # the last one is cut
    with torch.inference_mode():
        found = encoder_of(tower)(torch.from_numpy(tokens(sentences))).numpy()
    distance = float(np.abs(found - tower.encode(sentences)).max())
    if not distance < SAME:
        raise ConfigError(
            f"text.encoder {tower.name!r} cannot run in the training loop: from ids and a mask alone it gives other vectors "
            f"(by up to {distance:.3g}). Use sidecars (text.mode: sidecar, lock: text), or another encoder."
        )
