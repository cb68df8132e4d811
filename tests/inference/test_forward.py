"""The forward of a tower without a graph."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nev.inference.forward import make_embedder


def test_convolutions_take_no_tf32() -> None:
    seen: list[bool] = []

    def forward(pixels: Tensor) -> Tensor:
        seen.append(torch.backends.cudnn.allow_tf32)
        return pixels.flatten(1)

    embed = make_embedder(forward, (0.5,) * 3, (0.5,) * 3, torch.device("cpu"))
    assert embed(np.zeros((2, 4, 4, 3), np.uint8)).shape == (2, 48)
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32, "restored"
