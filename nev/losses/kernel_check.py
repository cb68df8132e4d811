"""A check of the fused kernels against the tiles, once a process: a compiler makes them anew for each GPU, and a wrong gradient
does not show in the loss.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nev.common.errors import NevError
from nev.losses import tiles
from nev.losses.gather import AsyncGather
from nev.losses.tiles import Statistics

# Largest difference: of a log-sum-exp, as a share of (the largest score + 4); of a gradient, as a share of its largest number.
# Tensor cores cut sums off where others round: 1.6e-5 of a gradient on an H200, for 65,536 pairs.
TOLERANCE = 1e-4
TF32_TOLERANCE = 5e-3  # where `torch.set_float32_matmul_precision` allows TF32, which has 11 bits

_verified: set[torch.device] = set()


class KernelMismatch(NevError, RuntimeError):
    """The fused kernels give other numbers than the tiles. The message names both."""


def verify_first_use(
    x: Tensor, gathering: AsyncGather, fused: Statistics, grad: Tensor, grad_texts: Tensor | None
) -> None:
    """Compare the results of the fused kernels with those of the tiles for the same input, the first time on a device.

    x: float32 [b, D], images times the scale, 0 in invalid rows.
    fused: statistics by the kernels, with the log-sum-exps over the images of all ranks as `column`.
    grad: float32 [b, D], gradient of the images by the kernels.
    grad_texts: float32 [N, D], gradient of the texts by the kernels; None where the texts require none.
    Collectives on the first use: one all_reduce of two numbers. Raises KernelMismatch on every rank where one rank differs.
    """
    if x.device in _verified:
        return
    errors = _relative_errors(x, gathering, fused, grad, grad_texts)
    if gathering.world > 1:
        dist.all_reduce(errors, dist.ReduceOp.MAX, gathering.group)
    limit = TOLERANCE if torch.get_float32_matmul_precision() == "highest" else TF32_TOLERANCE
    statistics, gradients = errors.tolist()
    if not (statistics <= limit and gradients <= limit):  # NaN is no match
        raise KernelMismatch(
            f"loss.kernel: fused gives other numbers than the tiles on {x.device}: log-sum-exps differ by {statistics:.2g}, "
            f"gradients by {gradients:.2g} (relative; at most {limit:g} is rounding). Train with loss.kernel: tiles, and please "
            "report the GPU and the versions of torch and triton."
        )
    _verified.add(x.device)


def _relative_errors(
    x: Tensor, gathering: AsyncGather, fused: Statistics, grad: Tensor, grad_texts: Tensor | None
) -> Tensor:
    """The largest differences, float32 [2]: of the log-sum-exps of rows, and of the gradients."""
    texts, valid_texts = gathering.wait()
    valid, first = gathering.valid, gathering.first
    expected = tiles.statistics(x, texts, valid, valid_texts, first)
    largest = x.norm(dim=1).max() + 4  # texts have unit length
    rows = ((fused.row + fused.shift) - (expected.row + expected.shift)).masked_fill(~valid, 0).abs().max() / largest
    global_stats = expected._replace(column=fused.column + fused.shift - expected.shift)
    right, right_texts = tiles.gradient(x, texts, valid, valid_texts, first, global_stats, grad_texts is not None)
    differences = [(grad - right).abs().max() / right.abs().max().clamp(min=torch.finfo(x.dtype).tiny)]
    if grad_texts is not None and right_texts is not None:
        size = right_texts.abs().max().clamp(min=torch.finfo(x.dtype).tiny)
        differences.append((grad_texts - right_texts).abs().max() / size)
    return torch.stack([rows, torch.stack(differences).amax()])
