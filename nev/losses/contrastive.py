"""Symmetric InfoNCE over the all-gathered batch, the text side locked or not.

With images x_i, texts t_j, scale tau = exp(log_scale), scores s_ij = tau <x_i, t_j>, row terms r_i = LSE_j s_ij and
column terms c_j = LSE_i s_ij over the N valid pairs of all ranks (van den Oord et al. 2018, Radford et al. 2021):

    L            = 1/(2N) [ sum_i (r_i - s_ii) + sum_j (c_j - s_jj) ]
    dL/dx_i      = tau/(2N) [ sum_j (e^(s_ij - r_i) + e^(s_ij - c_j)) t_j - 2 t_i ]
    dL/dlog tau  = sum_i <x_i, dL/dx_i>
    dL/dt_j      = as dL/dx_i with the roles exchanged; its sum runs over the images of all ranks

The forward computes the loss and the gradients, so that no collective runs in the backward. The b x N scores are never in
memory at once: they are computed twice, a tile at a time (`nev.losses.tiles`, or `nev.losses.fused` on a GPU), in O(N D)
memory (`tiles` keeps the exponentials of its first few). A row term is computed without communication; a column term needs two
all-reduces.

Collectives of a call, always in this order, none of them when W = 1:
  1. all_gather  [b, D + 1]  texts in their own dtype; the last column is 1 for valid pairs (`nev.losses.gather`: the gather
                             runs while the images are embedded)
  2. all_reduce  [N] MAX     column terms over each rank's images
  3. all_reduce  [N + 2] SUM column sums of exponentials, this rank's part of the loss, its number of correct images
  4. reduce_scatter [N, D]   gradient of the texts, only where the texts require one
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from nev.losses import fused, tiles
from nev.losses.gather import AsyncGather
from nev.losses.kernel_check import verify_first_use
from nev.losses.pairwise import LossAndGrads, LossOutput, PrecomputedGradient, gather_texts, local_share, upcast

Kernel = Literal["tiles", "fused"]


def contrastive_loss(
    image: Tensor,
    text: Tensor | AsyncGather,
    log_scale: Tensor,
    valid: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    kernel: Kernel = "tiles",
) -> LossOutput:
    """Symmetric InfoNCE between this rank's images and the texts of all ranks of `group`.

    image: [b, D] unit rows, any floating dtype.
    text: [b, D] unit rows, any floating dtype. A text that requires a gradient costs one more matrix product and a collective.
        Or the `AsyncGather` of the texts, which holds `valid` and `group` too: then leave these two out.
    log_scale: 0-d, the logarithm of 1 / temperature, equal on every rank.
    valid: bool [b]. A False row is neither an image, nor a text, nor a negative, whatever its numbers are (NaN too), and its
        gradient is exactly 0. None: all rows are valid.
    group: the ranks that share the batch. None: all ranks, or this process alone where torch.distributed is not initialised.
        b, D and the dtype of text must be equal on every rank.
    kernel: "tiles" (PyTorch), or "fused" (Triton, float32 on NVIDIA GPUs); equal on every rank. The first gradients that a
        process computes by "fused" are compared with those of "tiles". KernelMismatch is raised on every rank where they differ
        on one rank.

    A locked image tower is the same loss with image and text exchanged.

    Gradients: the loss is global. The gradient of a rank is its own contribution times W, so the mean over the W ranks, which
    DistributedDataParallel takes, is the gradient that one process with the whole batch would compute. This holds for log_scale,
    too. Code that sums over ranks must divide by W.

    Half precision is accumulated in float32, inside autocast too. With N = 0 the loss and every gradient are 0. The result is
    deterministic wherever torch's matrix product is deterministic. Raises ValueError for shapes, dtypes or devices that do not
    fit.
    """
    gathering = gather_texts(image, text, log_scale, valid, group)
    inputs = image, gathering.local, log_scale
    need_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)

    def compute() -> LossAndGrads:
        x = upcast(image, gathering)
        need_text_grad = need_grad and gathering.local.requires_grad
        return _infonce(x, gathering, log_scale.to(x.dtype).exp(), need_grad, need_text_grad, kernel)

    return LossOutput(*PrecomputedGradient.apply(compute, *inputs))


def _infonce(
    x: Tensor, gathering: AsyncGather, scale: Tensor, need_grad: bool, need_text_grad: bool, kernel: Kernel
) -> LossAndGrads:
    """The loss, and the gradients times W. x: [b, D] in the dtype of the computation, 0 in invalid rows."""
    valid, first, world, group = gathering.valid, gathering.first, gathering.world, gathering.group
    texts, valid_texts = gathering.wait()
    local = slice(first, first + len(x))
    pairs = valid_texts.sum()
    zero = x.new_zeros(())

    scaled = scale * x
    backend = fused if kernel == "fused" else tiles
    stats = backend.statistics(scaled, texts, valid, valid_texts, first)
    row_lse, pair_scores = (torch.where(valid, value, zero) for value in (stats.row, stats.pair))
    column_max = reduce_column_max(stats.column, stats.shift, valid_texts, gathering)
    column_sum = (stats.column - column_max).exp_()

    # Every term of the loss is at least 0 (r_i >= s_ii, c_j >= s_jj), so no large numbers cancel in the sum.
    part = (row_lse - pair_scores).sum() + (column_max[local] - pair_scores).sum()
    sums = torch.cat([column_sum, torch.stack([part, stats.best.correct(first, valid).to(x.dtype)])])
    if world > 1:
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    log_column_sum = torch.where(valid_texts, sums[:-2], 1).log()
    half_mean = 0.5 / pairs.clamp(min=1).to(x.dtype)
    loss = (sums[-2] + log_column_sum.sum()) * half_mean
    correct = sums[-1].round().long()
    terms = 0.5 * (row_lse - pair_scores + (column_max + log_column_sum)[local] - pair_scores)
    if not need_grad:
        return LossAndGrads(loss, correct, pairs, terms, (None, None, None))
    global_stats = stats._replace(column=column_max + log_column_sum)
    grad, grad_texts = backend.gradient(scaled, texts, valid, valid_texts, first, global_stats, need_text_grad)
    if kernel == "fused":
        verify_first_use(scaled, gathering, global_stats, grad, grad_texts)
    del scaled  # memory peaks below, where x and its gradient are multiplied
    grad.mul_(world * scale * half_mean)
    if grad_texts is not None:
        grad_texts = local_share(grad_texts.mul_(world * half_mean), gathering)
    return LossAndGrads(loss, correct, pairs, terms, (grad, grad_texts, torch.sum(x * grad)))


def reduce_column_max(column: Tensor, shift: Tensor, valid_texts: Tensor, gathering: AsyncGather) -> Tensor:
    """The maximum over the ranks of their column terms [..., N]; 0 for invalid texts.

    column: this rank's `shift` is subtracted already, and is so in the result.
    """
    if gathering.world > 1:
        column = column + shift
        dist.all_reduce(column, dist.ReduceOp.MAX, gathering.group)
        column -= shift
    return torch.where(valid_texts, column, 0)
