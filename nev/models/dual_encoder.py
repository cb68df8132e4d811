"""The model of a run: two towers into one space, and the scalars of the loss that are learned too."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn

from nev.config.model import Loss
from nev.models.frozen import FeatureHead
from nev.models.text_encoder import TextEncoder
from nev.models.vision import VisionTower

Embedded = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


class DualEncoder(nn.Module):
    """The vision tower, the text tower where it is trained, the logit scale, and the bias of a sigmoid loss.

    vision: the vision tower, or what is trained behind a locked trunk.
    loss: the initial logit scale.
    text: the text tower. None where the batch brings text vectors.
    vision_locked: the vision tower is not trained and stays in eval mode.
    bias: the initial bias of a sigmoid loss. None: no bias.
    """

    def __init__(
        self,
        vision: VisionTower | FeatureHead,
        loss: Loss,
        text: TextEncoder | None = None,
        vision_locked: bool = False,
        bias: float | None = None,
    ) -> None:
        super().__init__()
        self.vision, self.text, self.vision_locked = vision, text, vision_locked
        if vision_locked:
            vision.requires_grad_(False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(loss.init_scale)), requires_grad=loss.learn_scale)
        if bias is not None:
            self.bias = nn.Parameter(torch.tensor(bias))

    def train(self, mode: bool = True) -> Self:
        """Set the training mode, but leave a locked tower in eval mode."""
        super().train(mode)
        if self.vision_locked:
            self.vision.eval()
        return self

    def towers(self) -> list[nn.Module]:
        """The towers of the model. Validation calls their forwards directly."""
        return [self.vision, *([self.text.model] if self.text else [])]

    def forward(self, images: Tensor | None, tokens: Tensor | None) -> Embedded:
        """Embed images and texts. Returns (vectors, scalars).

        images: float [b, 3, S, S], or features of a locked trunk; None: no images.
        tokens: int [b, T]; None: no texts.
        vectors: unit vectors, float32 [b, D], of the images, then of the texts.
        scalars: the log of the logit scale, then the bias of a sigmoid loss, 0-d each.
        """
        vectors = () if images is None else (self.vision(images),)
        if tokens is not None:
            assert self.text is not None
            vectors = (*vectors, self.text(tokens))
        # The scalars go through forward so that DDP reduces their gradients too.
        return vectors, (self.log_scale, *((self.bias,) if hasattr(self, "bias") else ()))
