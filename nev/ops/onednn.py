"""Linear layers on a CPU through oneDNN.

PyTorch computes float32 matrix products on a CPU with MKL, which uses no more than AVX2 on processors that are not Intel's. Its
convolutions use oneDNN, which uses AVX-512 where the processor has it. (On Intel's, MKL does too, and is faster.) A linear layer
over tokens is a 1x1 convolution over pixels in channels-last order, so the tokens are not copied, and autograd works.
`benchmarks/results/train.json` has the gain of a training step: the bare loop with PyTorch's layers, and with these layers.
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
    if not _goes_through_onednn(rows):
        return F.linear(rows, weight, bias)
    pixels = rows.reshape(LEAST_BATCH, -1, rows.shape[1]).transpose(1, 2).unsqueeze(2)
    out = F.conv2d(pixels, weight.contiguous()[:, :, None, None], bias)
    return out.squeeze(2).transpose(1, 2).reshape(len(rows), -1)  # a view, since `out` is channels last


def add_product(total: Tensor, rows: Tensor, weight: Tensor) -> None:
    """Add to total [r, c] what `product` gives. rows and weight may be transposes: they are copied only where oneDNN needs it."""
    if _goes_through_onednn(rows):
        total += product(rows, weight)
    else:
        total.addmm_(rows, weight.T)


def transposed(weight: Tensor) -> Tensor:
    """The transpose of a weight [c, k] that takes part in several products: a copy where oneDNN needs it, else a view."""
    return weight.T.contiguous() if _goes_through_onednn(weight) else weight.T


@functools.cache
def is_faster() -> bool:
    """Whether oneDNN is faster than MKL: torch has it, and the processor has AVX-512 and is not Intel's."""
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    intel = torch.cpu.get_capabilities().get("cpu_name", "").startswith("Intel")
    return built and not intel and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _goes_through_onednn(rows: Tensor) -> bool:
    usable = rows.dtype == torch.float32 and rows.device.type == "cpu" and len(rows) % LEAST_BATCH == 0
    return usable and is_faster()


def use_onednn(model: nn.Module) -> None:
    """Where oneDNN is faster, turn every plain `nn.Linear` of `model` into a `Linear1x1`, in place."""
    if is_faster():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear1x1
