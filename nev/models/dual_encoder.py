"""Two towers into one space, and what is learned beside them: what a run trains."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn

from nev.config.experiment import Loss
from nev.models.text_encoder import TextEncoder
from nev.models.vision import VisionTower

Embedded = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


class DualEncoder(nn.Module):
    """The vision tower, the text tower where it is trained, the logit scale, and of the sigmoid loss its bias.

    Args:
        vision: stays as it is, in eval mode, if `vision_locked`.
        text: None where the texts are constants, whose vectors come with the batch.
    """

    def __init__(
        self, vision: VisionTower, loss: Loss, text: TextEncoder | None = None, vision_locked: bool = False
    ) -> None:
        super().__init__()
        self.vision, self.text, self.vision_locked = vision, text, vision_locked
        if vision_locked:
            vision.requires_grad_(False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(loss.init_scale)), requires_grad=loss.learn_scale)
        if loss.kind == "sigmoid":
            self.bias = nn.Parameter(torch.tensor(loss.init_bias))

    def train(self, mode: bool = True) -> Self:
        """As of any module, but a locked tower stays in eval mode."""
        super().train(mode)
        if self.vision_locked:
            self.vision.eval()
        return self

    def towers(self) -> list[nn.Module]:
        """The towers in it, each with a forward that others call too (validation)."""
        return [self.vision, *([self.text.model] if self.text else [])]

    def forward(self, images: Tensor | None, tokens: Tensor | None) -> Embedded:
        """(unit vectors float32 [b, D] of what is given, images first), (the log of the logit scale, the bias if any, 0-d).

        images: float [b, 3, S, S]. tokens: int [b, T].
        """
        vectors = () if images is None else (self.vision(images),)
        if tokens is not None:
            assert self.text is not None
            vectors = (*vectors, self.text(tokens))
        # What is learned beside the towers goes through forward so that DDP reduces its gradient with the rest.
        return vectors, (self.log_scale, *((self.bias,) if hasattr(self, "bias") else ()))
