"""The number format of a tower's forward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """The number format of a forward: float32 (no autocast), or bfloat16 under autocast."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> AbstractContextManager[object]:
        """The context of a forward."""
        return nullcontext() if self.dtype is torch.float32 else torch.autocast(self.device.type, self.dtype)


def choose_precision(setting: str, device: torch.device) -> Precision:
    """The precision of `train.precision`: "fp32", "bf16", or "auto", which is bfloat16 on a GPU that has it, else float32."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    use_bf16 = setting == "bf16" or (setting == "auto" and has_bf16)
    return Precision(device, torch.bfloat16 if use_bf16 else torch.float32)
