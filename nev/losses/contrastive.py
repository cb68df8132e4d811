"""Symmetric InfoNCE over the all-gathered batch, the text side locked or not.

With images x_i, texts t_j, scale tau = exp(log_scale), scores s_ij = tau <x_i, t_j>, row terms r_i = LSE_j s_ij and
column terms c_j = LSE_i s_ij over the N valid pairs of all ranks (van den Oord et al. 2018, Radford et al. 2021):

    L            = 1/(2N) [ sum_i (r_i - s_ii) + sum_j (c_j - s_jj) ]
    dL/dx_i      = tau/(2N) [ sum_j (e^(s_ij - r_i) + e^(s_ij - c_j)) t_j - 2 t_i ]
    dL/dlog tau  = sum_i <x_i, dL/dx_i>
    dL/dt_j      = as dL/dx_i with the roles exchanged; its sum runs over the images of all ranks

The forward computes the loss and the gradients, because every number that they need is there: no collective runs in
the backward. The b x N scores are never there: they are computed a tile at a time, twice (`nev.losses.tiles`, on a
GPU `nev.losses.fused`), so that memory is O(N D). A row term is local; a column term takes two all-reduces.

Collectives a call, always in this order, none of them when W = 1:
  1. all_gather  [b, D + 1]  the texts in their own dtype; the last column says which pairs are valid (`nev.losses.gather`:
                             begun before the images are embedded, it costs no time)
  2. all_reduce  [N] MAX     the column terms over each rank's images
  3. all_reduce  [N + 2] SUM what they are of the sums, this rank's part of the loss, its number of correct images
  4. reduce_scatter [N, D]   for texts that want a gradient alone: each rank's part of it
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from nev.losses import fused, tiles
from nev.losses.gather import AsyncGather
from nev.losses.kernel_check import verify_first_use
from nev.losses.pairwise import LossAndGrads, LossOutput, PrecomputedGradient, gathered, local_share, upcast

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

    image: [b, D] unit rows, any floating dtype. text: [b, D] unit rows, any floating dtype; it gets a gradient if it wants
    one, at the price of a fourth matrix product and a collective (a locked image side is this with both exchanged); or
    what `gather` made of them, of `valid` and of `group`, which are not given again then.
    log_scale: 0-d, the logarithm of 1 / temperature, equal on every rank.
    valid: bool [b]; a False row is left out as an image, as a text and as anybody's negative, whatever it holds (NaN
    too), and its gradient is exactly 0. None: all valid.
    group: the ranks that share the batch; None: all of them, or this process alone where torch.distributed is not
    initialised. b, D and the dtype of text must be equal on every rank (see `gather`).
    kernel: "tiles" (PyTorch), or "fused" (Triton, float32 on NVIDIA GPUs; equal on every rank). The first gradients of a
    process by "fused" are compared with those of "tiles": KernelMismatch on every rank where they differ on one.

    Gradients: the loss is global, and rank w holds only its own images and texts, so the gradients that it gets are its *part*
    of the sum over ranks, times W. Averaging them over the W ranks, as DistributedDataParallel does, therefore gives every
    parameter, log_scale included, the gradient that one process with the whole batch would have given it. Whoever sums
    over ranks instead must divide by W.

    Half precision is accumulated in float32, inside autocast too. With N = 0 the loss is 0 and so is every gradient.
    The result is deterministic wherever torch's matrix product is. Raises ValueError for shapes, dtypes or devices that
    do not fit.
    """
    texts = gathered(image, text, log_scale, valid, group)
    with_grad = torch.is_grad_enabled() and any(one.requires_grad for one in (image, texts.own, log_scale))

    def compute() -> LossAndGrads:
        x = upcast(image, texts)
        return _infonce(x, texts, log_scale.to(x.dtype).exp(), with_grad, with_grad and texts.own.requires_grad, kernel)

    return LossOutput(*PrecomputedGradient.apply(compute, image, texts.own, log_scale))


def _infonce(
    x: Tensor, gathering: AsyncGather, scale: Tensor, with_grad: bool, of_texts: bool, kernel: Kernel
) -> LossAndGrads:
    """The loss, and its gradients times W. x: [b, D] in the dtype to compute in, its invalid rows 0."""
    valid, first, world, group = gathering.valid, gathering.first, gathering.world, gathering.group
    texts, valid_texts = gathering.wait()
    own = slice(first, first + len(x))
    pairs = valid_texts.sum()
    zero = x.new_zeros(())

    scaled = scale * x
    walks = fused if kernel == "fused" else tiles
    found = walks.statistics(scaled, texts, valid, valid_texts, first)
    row_lse, own_scores = (torch.where(valid, value, zero) for value in (found.row, found.own))
    column_max = highest(found.column, found.shift, valid_texts, gathering)
    column_sum = (found.column - column_max).exp_()

    # Every term of the loss is at least 0 (r_i >= s_ii, c_j >= s_jj): nothing large cancels in the sum.
    part = (row_lse - own_scores).sum() + (column_max[own] - own_scores).sum()
    sums = torch.cat([column_sum, torch.stack([part, found.best.correct(first, valid).to(x.dtype)])])
    if world > 1:
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    log_column_sum = torch.where(valid_texts, sums[:-2], 1).log()
    half_mean = 0.5 / pairs.clamp(min=1).to(x.dtype)
    loss = (sums[-2] + log_column_sum.sum()) * half_mean
    correct = sums[-1].round().long()
    if not with_grad:
        return LossAndGrads(loss, correct, pairs, (None, None, None))
    everywhere = found._replace(column=column_max + log_column_sum)
    grad, grad_texts = walks.gradient(scaled, texts, valid, valid_texts, first, everywhere, of_texts)
    if kernel == "fused":
        verify_first_use(scaled, gathering, everywhere, grad, grad_texts)
    del scaled  # the peak is below, where x and its gradient are multiplied
    grad.mul_(world * scale * half_mean)
    if grad_texts is not None:
        grad_texts = local_share(grad_texts.mul_(world * half_mean), gathering)
    return LossAndGrads(loss, correct, pairs, (grad, grad_texts, torch.sum(x * grad)))


def highest(column: Tensor, shift: Tensor, valid_texts: Tensor, gathering: AsyncGather) -> Tensor:
    """The highest of the ranks' column terms [..., N], which are less each rank's own `shift`; 0 for invalid texts."""
    if gathering.world > 1:
        column = column + shift
        dist.all_reduce(column, dist.ReduceOp.MAX, gathering.group)
        column -= shift
    return torch.where(valid_texts, column, 0)
