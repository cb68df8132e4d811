"""Linear layers through oneDNN where the CPU does the work.

PyTorch gives float32 matrix products on a CPU to MKL, which keeps to AVX2 on processors that are not Intel's; its
convolutions go to oneDNN, which uses AVX-512 where there is any. A linear layer over tokens is a 1x1 convolution over pixels
that lie channels last, so the tokens are not copied, and autograd knows the way back. What a training step gains is in
`benchmarks/results/train.json`: the bare loop with PyTorch's layers, and with these.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_BATCH = 16  # below it torch keeps a 1x1 convolution on one thread to itself (`use_mkldnn` in its Convolution.cpp)


class Linear1x1(nn.Linear):
    """`nn.Linear` with the same parameters, and the same results to rounding."""

    def forward(self, x: Tensor) -> Tensor:
        """float [..., in] -> float [..., out]. Tokens float32 [b, T, in] on a CPU take the way through oneDNN."""
        tokens = x.ndim == 3 and len(x) >= LEAST_BATCH
        if not tokens or x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        pixels = x.transpose(1, 2).unsqueeze(2)  # [b, T, in] -> [b, in, 1, T], channels last as it lies
        out = F.conv2d(pixels, self.weight[:, :, None, None], self.bias)
        return out.squeeze(2).transpose(1, 2)


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows [r, k] times the transpose of weight [c, k], plus bias [c]: [r, c]; through oneDNN where it pays."""
    usable = rows.dtype == torch.float32 and rows.device.type == "cpu" and len(rows) % LEAST_BATCH == 0
    if not usable or not is_faster():
        return F.linear(rows, weight, bias)
    pixels = rows.view(LEAST_BATCH, -1, rows.shape[1]).transpose(1, 2).unsqueeze(2)
    out = F.conv2d(pixels, weight[:, :, None, None], bias)
    return out.squeeze(2).transpose(1, 2).reshape(len(rows), -1)  # a view: it lies channels last


@functools.cache
def is_faster() -> bool:
    """Whether oneDNN has more to work with than MKL might: this torch is built with it, and the processor has AVX-512."""
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def use_onednn(model: nn.Module) -> None:
    """Where it pays, let every plain `nn.Linear` of `model` be a `Linear1x1`; nothing else about it changes."""
    if is_faster():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear1x1
