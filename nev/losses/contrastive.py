"""Symmetric InfoNCE over the all-gathered batch, the text side locked or not.

With images x_i, texts t_j, scale tau = exp(log_scale), scores s_ij = tau <x_i, t_j>, row terms r_i = LSE_j s_ij and
column terms c_j = LSE_i s_ij over the N valid pairs of all ranks (van den Oord et al. 2018, Radford et al. 2021):

    L            = 1/(2N) [ sum_i (r_i - s_ii) + sum_j (c_j - s_jj) ]
    dL/dx_i      = tau/(2N) [ sum_j (e^(s_ij - r_i) + e^(s_ij - c_j)) t_j - 2 t_i ]
    dL/dlog tau  = sum_i <x_i, dL/dx_i>
    dL/dt_j      = as dL/dx_i with the roles exchanged; its sum runs over the images of all ranks

The forward computes the loss and the gradients, because every number that they need is there: no collective runs in
the backward. The b x N scores are never there: they are computed a tile at a time, twice (`nev.losses.tiles`), so that memory
is O(N D). A row term is local; a column term takes two all-reduces.

Collectives a call, always in this order, none of them when W = 1:
  1. all_gather  [b, D + 1]  the texts in their own dtype; the last column says which pairs are valid (`nev.losses.gather`:
                             begun before the images are embedded, it costs no time)
  2. all_reduce  [N] MAX     the column terms over each rank's images
  3. all_reduce  [N + 2] SUM what they are of the sums, this rank's part of the loss, its number of correct images
  4. reduce_scatter [N, D]   for texts that want a gradient alone: each rank's part of it
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nev.losses.gather import Gathering, gather
from nev.losses.tiles import gradient, statistics


class Contrastive(NamedTuple):
    """The loss of the global batch, and two counts of it. All three are 0-d and equal on every rank.

    loss: float32 (float64 for float64 inputs), differentiable in `image`, `log_scale`, and `text` where it wants a gradient.
    correct: int64, valid images whose highest-scoring valid text is their own. Of tied texts the first one wins, so
        that collapsed embeddings score 1 of N, and one of several images with one caption can. Detached.
    pairs: int64, N, the valid pairs. Detached.
    """

    loss: Tensor
    correct: Tensor
    pairs: Tensor


def contrastive_loss(
    image: Tensor,
    text: Tensor | Gathering,
    log_scale: Tensor,
    valid: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Contrastive:
    """Symmetric InfoNCE between this rank's images and the texts of all ranks of `group`.

    image: [b, D] unit rows, any floating dtype. text: [b, D] unit rows, any floating dtype; it gets a gradient if it wants
    one, at the price of a fourth matrix product and a collective (a locked image side is this with both exchanged); or
    what `gather` made of them, of `valid` and of `group`, which are not given again then.
    log_scale: 0-d, the logarithm of 1 / temperature, equal on every rank.
    valid: bool [b]; a False row is left out as an image, as a text and as anybody's negative, whatever it holds (NaN
    too), and its gradient is exactly 0. None: all valid.
    group: the ranks that share the batch; None: all of them, or this process alone where torch.distributed is not
    initialised. b, D and the dtype of text must be equal on every rank (see `gather`).

    Gradients: the loss is global, and rank w holds only its own images and texts, so the gradients that it gets are its *part*
    of the sum over ranks, times W. Averaging them over the W ranks, as DistributedDataParallel does, therefore gives every
    parameter, log_scale included, the gradient that one process with the whole batch would have given it. Whoever sums
    over ranks instead must divide by W.

    Half precision is accumulated in float32, inside autocast too. With N = 0 the loss is 0 and so is every gradient.
    The result is deterministic wherever torch's matrix product is. Raises ValueError for shapes, dtypes or devices that
    do not fit.
    """
    if isinstance(text, Gathering):
        if valid is not None or group is not None:
            raise ValueError("valid and group belong to the texts that were gathered: give them to gather")
        _check(image, text.own, log_scale, text.valid)
        texts = text
    else:
        _check(image, text, log_scale, valid)
        texts = gather(text, valid, group)
    with_grad = torch.is_grad_enabled() and any(one.requires_grad for one in (image, texts.own, log_scale))
    return Contrastive(*_InfoNCE.apply(image, texts.own, log_scale, texts, with_grad))


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, log_scale: Tensor, texts: Gathering, with_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(torch.promote_types(image.dtype, texts.own.dtype), torch.float32)
        with torch.autocast(image.device.type, enabled=False):
            # What an invalid row holds must not reach a product, not even with weight 0: NaN * 0 is NaN.
            x = image.to(dtype).masked_fill(~texts.valid[:, None], 0)
            of_texts = with_grad and text.requires_grad
            loss, correct, pairs, grad, grad_text = _infonce(x, texts, log_scale.to(dtype).exp(), with_grad, of_texts)
            if grad is not None:
                ctx.save_for_backward(grad, grad_text, torch.sum(x * grad))
        ctx.dtypes = image.dtype, text.dtype, log_scale.dtype
        ctx.mark_non_differentiable(correct, pairs)
        return loss, correct, pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Rounded last: a gradient of 1/N underflows in fp16 unless a loss scaler has enlarged it first.
        found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if grad is None else (grad_loss * grad).to(dtype) for grad, dtype in found), None, None


def _infonce(
    x: Tensor, gathering: Gathering, scale: Tensor, with_grad: bool, of_texts: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(loss, correct, pairs, W times dL/dx, W times dL/dt of this rank's texts).

    x: [b, D] in the dtype to compute in, its invalid rows 0.
    """
    valid, first, world, group = gathering.valid, gathering.first, gathering.world, gathering.group
    texts, valid_texts = gathering.arrived()
    own = slice(first, first + len(x))
    pairs = valid_texts.sum()
    zero = x.new_zeros(())

    scaled = scale * x
    found = statistics(scaled, texts, valid, valid_texts, first)
    row_lse, own_scores = (torch.where(valid, value, zero) for value in (found.row, found.own))
    column_max = found.column
    if world > 1:
        column_max = column_max + found.shift  # each rank has its own
        dist.all_reduce(column_max, dist.ReduceOp.MAX, group)
        column_max -= found.shift
    column_max = torch.where(valid_texts, column_max, zero)
    column_sum = (found.column - column_max).exp_()

    # Every term of the loss is at least 0 (r_i >= s_ii, c_j >= s_jj): nothing large cancels in the sum.
    part = (row_lse - own_scores).sum() + (column_max[own] - own_scores).sum()
    correct = ((found.best == torch.arange(own.start, own.stop, device=x.device)) & valid).sum()
    sums = torch.cat([column_sum, torch.stack([part, correct.to(x.dtype)])])
    if world > 1:
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    log_column_sum = torch.where(valid_texts, sums[:-2], 1).log()
    half_mean = 0.5 / pairs.clamp(min=1).to(x.dtype)
    loss = (sums[-2] + log_column_sum.sum()) * half_mean
    correct = sums[-1].round().long()
    if not with_grad:
        return loss, correct, pairs, None, None
    everywhere = found._replace(column=column_max + log_column_sum)
    grad, grad_texts = gradient(scaled, texts, valid, valid_texts, first, everywhere, of_texts)
    if grad_texts is not None:
        grad_texts = _own_share(grad_texts.mul_(world * half_mean), gathering)
    return loss, correct, pairs, grad.mul_(world * scale * half_mean), grad_texts


def _own_share(parts: Tensor, gathering: Gathering) -> Tensor:
    """Of [N, D] on each rank, the sum over the ranks of this rank's rows: [b, D]."""
    if gathering.world == 1:
        return parts
    own = parts.new_empty(len(parts) // gathering.world, parts.shape[1])
    dist.reduce_scatter_tensor(own, parts, dist.ReduceOp.SUM, gathering.group)
    return own


def _check(image: Tensor, text: Tensor, log_scale: Tensor, valid: Tensor | None) -> None:
    if image.ndim != 2 or image.shape != text.shape or not len(image):
        raise ValueError(
            f"image and text must both be [b, D] with b >= 1, not {list(image.shape)} and {list(text.shape)}: "
            "project them to one width, and give every image its own text"
        )
    if log_scale.ndim:
        raise ValueError(f"log_scale must be 0-d, not {list(log_scale.shape)}")
    for name, tensor in (("image", image), ("text", text), ("log_scale", log_scale)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {tensor.dtype}")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != image.shape[:1]):
        raise ValueError(f"valid must be bool [{len(image)}], not {valid.dtype} {list(valid.shape)}")
    devices = {str(tensor.device) for tensor in (image, text, log_scale, valid) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"image, text, log_scale and valid must be on one device, not on {sorted(devices)}")
