"""One optimiser update: images in, loss over the all-gathered batch, gradients, clip, AdamW."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nev.config.experiment import Experiment
from nev.config.model import Loss
from nev.losses.contrastive import contrastive_loss
from nev.losses.gather import AsyncGather, start_gather
from nev.losses.matryoshka import matryoshka_loss
from nev.losses.pairwise import LossOutput
from nev.losses.sigmoid import sigmoid_loss
from nev.models.dual_encoder import DualEncoder, Embedded
from nev.models.precision import Precision
from nev.models.vision import as_input
from nev.train.core.gradcache import backward_in_parts
from nev.train.core.parallel import clip_gradients, unwrap


class Batch(NamedTuple):
    """A rank's share of a step.

    images: uint8 [b, S, S, 3]; or float16 [b, F] or [b, T, F], features of a locked trunk.
    text: unit vectors, float [b, D]. Where the text tower is trained: token ids, int32 [b, T], -1 after the end.
    valid: bool [b]; False for a row that the loss must not see.
    sets: int64 [b], number of each row's set in a mixture; None for one set.
    """

    images: Tensor
    text: Tensor
    valid: Tensor
    sets: Tensor | None = None


class StepResult(NamedTuple):
    """Detached tensors on the training device, 0-d and equal on every rank but for `terms`. None of them blocks on the GPU.

    correct: int64, valid images whose own text scores highest.
    pairs: int64, valid rows of the global batch.
    grad_norm: before clipping. If the loss or the norm is not finite, the step changed nothing.
    terms: [b], of this rank's pairs, as `LossOutput` has them.
    """

    loss: Tensor
    correct: Tensor
    pairs: Tensor
    grad_norm: Tensor
    terms: Tensor


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, config: Experiment, precision: Precision
) -> StepResult:
    """Update `model` once on the global batch. Every rank calls this with its share.

    model: a DualEncoder, alone, under DDP or under FSDP.
    A local batch above `train.micro_batch` is embedded in parts (`nev.train.core.gradcache`). Without a finite loss and gradient
    nothing is updated. The logit scale is clamped to `loss.max_scale` after the update.
    Collectives: those of the loss, and of DDP or FSDP (`nev.train.capacity.collectives`).
    """
    dual = unwrap(model)
    assert isinstance(dual, DualEncoder)
    local = len(batch.images)
    part = min(config.train.micro_batch or local, local)
    parts = [slice(start, start + part) for start in range(0, local, part)]

    def inputs(rows: slice) -> Tensor:
        return as_input(batch.images[rows], config.data.mean, config.data.std)

    def embed(model: nn.Module, rows: slice) -> Embedded:
        images, tokens = None if dual.vision_locked else inputs(rows), batch.text[rows] if dual.text else None
        with precision.autocast():
            embedded: Embedded = model(images, tokens)
        return embedded

    def loss(vectors: Sequence[Tensor], scalars: Sequence[Tensor]) -> LossOutput:
        others = start_gather(vectors[1], batch.valid) if locked_side is None else locked_side
        return compute_loss(config.loss, vectors[0], others, *scalars)

    optimizer.zero_grad(set_to_none=True)
    # The vectors of the locked side are gathered while the trained side is embedded.
    locked_side = None
    if dual.text is None:
        locked_side = start_gather(batch.text, batch.valid)
    elif dual.vision_locked:
        with torch.no_grad(), precision.autocast():
            images = torch.cat([dual.vision(inputs(rows)) for rows in parts])
        locked_side = start_gather(images, batch.valid)
    if len(parts) > 1:
        result = backward_in_parts(model, parts, embed, loss, batch.images.device)
    else:
        result = loss(*embed(model, slice(None)))
        torch.autograd.backward(result.loss)
    grad_norm = update_parameters(optimizer, result.loss, config.optim.clip_norm)
    if config.loss.max_scale is not None:
        with torch.no_grad():
            dual.log_scale.clamp_(max=math.log(config.loss.max_scale))
    return StepResult(result.loss.detach(), result.correct, result.pairs, grad_norm, result.terms)


def update_parameters(optimizer: torch.optim.Optimizer, loss: Tensor, clip_norm: float | None) -> Tensor:
    """Clip the gradients and update the parameters. Returns the norm of the gradients before clipping, 0-d.

    loss: 0-d. If the loss or the norm is not finite, nothing is updated. The call does not block on the GPU.
    clip_norm: the largest norm of all gradients together; None for no limit.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = clip_gradients(parameters, math.inf if clip_norm is None else clip_norm)
    # Where `found_inf` is 1, fused AdamW leaves weights, moments and its count of steps alone.
    optimizer.found_inf = 1.0 - (torch.isfinite(loss) & torch.isfinite(grad_norm)).float()  # type: ignore[attr-defined]
    optimizer.step()
    return grad_norm.detach()


def compute_loss(
    config: Loss, vectors: Tensor, others: AsyncGather, log_scale: Tensor, bias: Tensor | None = None
) -> LossOutput:
    """The loss that `config` names.

    vectors: this rank's unit vectors of one side, [b, D]. others: the vectors of the other side, of all ranks.
    log_scale, bias: 0-d parameters; a bias only for the sigmoid loss.
    """
    if config.matryoshka:
        return matryoshka_loss(vectors, others, log_scale, config.matryoshka, bias)
    return (
        contrastive_loss(vectors, others, log_scale, kernel=config.kernel)
        if bias is None
        else sigmoid_loss(vectors, others, log_scale, bias)
    )
