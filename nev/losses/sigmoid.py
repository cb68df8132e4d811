"""The sigmoid loss over the all-gathered batch (SigLIP: Zhai et al. 2023, arXiv 2303.15343), the text side locked or not.

With scores s_ij = tau <x_i, t_j> + beta, z_ij = 1 for pairs and -1 for all others, over the N valid pairs of all ranks:

    L            = -1/N sum_ij log sigmoid(z_ij s_ij)
    dL/ds_ij     = 1/N (sigmoid(s_ij) - [i and j are a pair])
    dL/dx_i      = tau sum_j dL/ds_ij t_j;   dL/dlog tau = sum_i <x_i, dL/dx_i>;   dL/dbeta = sum_ij dL/ds_ij

The term of a score needs no other score, so one pass over the tiles (`nev.losses.tiles`) gives the loss and its gradients: two
matrix products, three with unlocked texts.

Collectives of a call, in this order, none of them when W = 1: all_gather of the texts (`nev.losses.gather`); all_reduce [2] SUM
of this rank's part of the loss and its number of correct images; reduce_scatter [N, D], only where the texts require a gradient.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nev.losses.gather import AsyncGather
from nev.losses.pairwise import LossAndGrads, LossOutput, PrecomputedGradient, gather_texts, local_share, upcast
from nev.losses.tiles import RunningArgmax, iterate_tiles, pairs_in_tile
from nev.ops.onednn import add_product

SOFTPLUS_THRESHOLD = 50.0  # softplus(x) is x there, to float64's last digit


def sigmoid_loss(
    image: Tensor,
    text: Tensor | AsyncGather,
    log_scale: Tensor,
    bias: Tensor,
    valid: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> LossOutput:
    """The sigmoid loss between this rank's images and the texts of all ranks of `group`.

    bias: beta, 0-d, equal on every rank. (The paper starts with a bias of -10 and a scale of 10.)

    The other arguments, the result and the scale of the gradients are those of `contrastive_loss`. Raises ValueError as
    `contrastive_loss` does, and for a bias that is not 0-d.
    """
    if bias.ndim:
        raise ValueError(f"bias must be 0-d, not {list(bias.shape)}")
    gathering = gather_texts(image, text, log_scale, valid, group)
    inputs = image, gathering.local, log_scale, bias
    need_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)

    def compute() -> LossAndGrads:
        x = upcast(image, gathering)
        need_text_grad = need_grad and gathering.local.requires_grad
        return _sigmoid(x, gathering, log_scale.to(x.dtype).exp(), bias.to(x.dtype), need_grad, need_text_grad)

    return LossOutput(*PrecomputedGradient.apply(compute, *inputs))


def _sigmoid(
    x: Tensor, gathering: AsyncGather, scale: Tensor, bias: Tensor, need_grad: bool, need_text_grad: bool
) -> LossAndGrads:
    """The loss, and the gradients times W. x: [b, D] in the dtype of the computation, 0 in invalid rows."""
    valid, first, world = gathering.valid, gathering.first, gathering.world
    texts, valid_texts = gathering.wait()
    scaled = scale * x
    best = RunningArgmax.start(x)
    terms, excess = x.new_zeros(len(x)), x.new_zeros(len(x))
    grad = torch.zeros_like(x)
    grad_texts = x.new_zeros(texts.shape) if need_text_grad else None
    for tile in iterate_tiles(scaled, texts, valid_texts, -bias):
        rows, columns, scores = tile.rows, tile.columns, tile.scores()
        offset = first + rows.start - columns.start
        best.update(rows, columns, scores, offset)
        part = F.softplus(scores, threshold=SOFTPLUS_THRESHOLD)
        pairs = pairs_in_tile(part, offset)
        pairs.copy_(F.softplus(-pairs_in_tile(scores, offset), threshold=SOFTPLUS_THRESHOLD))
        terms[rows] += part.sum(1)
        if not need_grad:
            continue
        weights = scores.sigmoid_()
        pairs_in_tile(weights, offset).sub_(1)
        excess[rows] += weights.sum(1)
        add_product(grad[rows], weights, tile.across)
        if grad_texts is not None:  # invalid images are 0 in x, so their weights add nothing
            add_product(grad_texts[columns], weights.T, tile.images.T)
    zero = x.new_zeros(())
    terms = torch.where(valid, terms, zero)
    sums = torch.stack([terms.sum(), best.correct(first, valid).to(x.dtype)])
    if world > 1:
        dist.all_reduce(sums, dist.ReduceOp.SUM, gathering.group)
    pairs = valid_texts.sum()
    mean = 1 / pairs.clamp(min=1).to(x.dtype)
    loss, correct = sums[0] * mean, sums[1].round().long()
    if not need_grad:
        return LossAndGrads(loss, correct, pairs, terms, (None, None, None, None))
    del scaled  # memory peaks below, where x and its gradient are multiplied
    grad.masked_fill_(~valid[:, None], 0).mul_(world * scale * mean)
    if grad_texts is not None:
        grad_texts.masked_fill_(~valid_texts[:, None], 0)
        grad_texts = local_share(grad_texts.mul_(world * mean), gathering)
    grad_bias = torch.where(valid, excess, zero).sum() * (world * mean)
    return LossAndGrads(loss, correct, pairs, terms, (grad, grad_texts, torch.sum(x * grad), grad_bias))
