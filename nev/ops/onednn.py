"""Linear layers on a CPU through oneDNN.

PyTorch computes float32 matrix products on a CPU with MKL, which uses no more than AVX2 on processors that are not Intel's. Its
convolutions use oneDNN, which uses AVX-512 where the processor has it. A linear layer over tokens is a 1x1 convolution over
pixels in channels-last order, so the tokens are not copied, and autograd works. `benchmarks/results/train.json` has the gain of a
training step: the bare loop with PyTorch's layers, and with these layers.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_BATCH = 16  # a smaller batch does not reach oneDNN on one thread (`use_mkldnn` in torch's Convolution.cpp)


class Linear1x1(nn.Linear):
    """`nn.Linear` through oneDNN, with the same parameters, and with the same results up to rounding."""

    def forward(self, x: Tensor) -> Tensor:
        """float [..., in] -> float [..., out]. Tokens, float32 [b, T, in] on a CPU, are computed by oneDNN."""
        tokens = x.ndim == 3 and len(x) >= LEAST_BATCH
        if not tokens or x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        pixels = x.transpose(1, 2).unsqueeze(2)  # [b, T, in] -> [b, in, 1, T], a channels-last view
        out = F.conv2d(pixels, self.weight[:, :, None, None], self.bias)
        return out.squeeze(2).transpose(1, 2)


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows [r, k] times the transpose of weight [c, k], plus bias [c]: [r, c]. Computed by oneDNN where that is faster."""
    usable = rows.dtype == torch.float32 and rows.device.type == "cpu" and len(rows) % LEAST_BATCH == 0
    if not usable or not is_faster():
        return F.linear(rows, weight, bias)
    pixels = rows.view(LEAST_BATCH, -1, rows.shape[1]).transpose(1, 2).unsqueeze(2)
    out = F.conv2d(pixels, weight[:, :, None, None], bias)
    return out.squeeze(2).transpose(1, 2).reshape(len(rows), -1)  # a view, since `out` is channels last


@functools.cache
def is_faster() -> bool:
    """Whether oneDNN is faster than MKL may be: torch is built with oneDNN, and the processor has AVX-512."""
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def use_onednn(model: nn.Module) -> None:
    """Where oneDNN is faster, turn every plain `nn.Linear` of `model` into a `Linear1x1`, in place."""
    if is_faster():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear1x1
