"""One optimiser update: images in, loss over the all-gathered batch, gradients, clip, AdamW."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nev.config import Experiment, Loss
from nev.losses.contrastive import contrastive_loss
from nev.losses.gather import gather
from nev.losses.matryoshka import matryoshka_loss
from nev.losses.pairwise import Contrastive
from nev.losses.sigmoid import sigmoid_loss
from nev.models.vision import VisionTower, normalise
from nev.train.gradcache import backward_in_parts
from nev.train.parallel import bare, clip_gradients


class Batch(NamedTuple):
    """A rank's share of a step. images: uint8 [b, S, S, 3]; text: unit vectors, float [b, D]; valid: bool [b]."""

    images: Tensor
    text: Tensor
    valid: Tensor


class StepResult(NamedTuple):
    """Detached 0-d tensors on the training device, equal on every rank: nothing here waits for the device.

    grad_norm: before it was clipped. A step where it, or the loss, is not finite has changed nothing.
    """

    loss: Tensor
    correct: Tensor
    pairs: Tensor
    grad_norm: Tensor


class DualEncoder(nn.Module):
    """The vision tower and the logit scale: what is trained (the text tower is a constant, its vectors come with the batch)."""

    def __init__(self, vision: VisionTower, loss: Loss) -> None:
        super().__init__()
        self.vision = vision
        self.log_scale = nn.Parameter(torch.tensor(math.log(loss.init_scale)), requires_grad=loss.learn_scale)
        if loss.kind == "sigmoid":
            self.bias = nn.Parameter(torch.tensor(loss.init_bias))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """float [b, 3, S, S] -> unit vectors float32 [b, D], the log of the logit scale, of the sigmoid loss its bias (0-d)."""
        # What is learned beside the tower goes through forward so that DDP reduces its gradient with the rest.
        return self.vision(images), self.log_scale, *((self.bias,) if hasattr(self, "bias") else ())


def log_scale_of(model: nn.Module) -> Tensor:
    """The parameter of a DualEncoder, bare or under DDP."""
    dual = bare(model)
    assert isinstance(dual, DualEncoder)
    return dual.log_scale


@dataclass(frozen=True)
class Precision:
    """What autocast runs in: float32 (no autocast) or bfloat16."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> AbstractContextManager[object]:
        """The context of a forward."""
        return nullcontext() if self.dtype is torch.float32 else torch.autocast(self.device.type, self.dtype)


def choose_precision(wanted: str, device: torch.device) -> Precision:
    """`auto` is bfloat16 on a GPU that has it, else float32."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    use_bf16 = wanted == "bf16" or (wanted == "auto" and has_bf16)
    return Precision(device, torch.bfloat16 if use_bf16 else torch.float32)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, config: Experiment, precision: Precision
) -> StepResult:
    """One update of `model` (a DualEncoder, bare, under DDP or FSDP) on the global batch that `batch` is a share of.

    With `train.micro_batch` below the local batch it is embedded in parts (`nev.train.gradcache`). Collectives: those of the
    loss and of DDP or FSDP. Without a finite loss and gradient nothing is updated. The scale is clamped to
    `loss.max_scale` after the update.
    """

    def embed(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
        pixels = normalise(images, config.data.mean, config.data.std)
        with precision.autocast():
            vectors, *scalars = model(pixels)
        return vectors.float(), *scalars

    def loss(vectors: Tensor, log_scale: Tensor, *bias: Tensor) -> Contrastive:
        if config.loss.matryoshka:
            return matryoshka_loss(vectors, texts, log_scale, config.loss.matryoshka, bias[0] if bias else None)
        return sigmoid_loss(vectors, texts, log_scale, bias[0]) if bias else contrastive_loss(vectors, texts, log_scale)

    optimizer.zero_grad(set_to_none=True)
    texts = gather(batch.text, batch.valid)  # they come, in the fp16 of the sidecars, while the images are embedded
    if config.train.micro_batch is not None and config.train.micro_batch < len(batch.images):
        result = backward_in_parts(model, batch.images, config.train.micro_batch, embed, loss)
    else:
        result = loss(*embed(model, batch.images))
        torch.autograd.backward(result.loss)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    limit = config.optim.clip_norm if config.optim.clip_norm is not None else math.inf
    grad_norm = clip_gradients(parameters, limit)
    # Where this is 1, fused AdamW leaves weights, moments and its count of steps alone: nobody waits for the device to ask.
    optimizer.found_inf = 1.0 - (torch.isfinite(result.loss) & torch.isfinite(grad_norm)).float()  # type: ignore[attr-defined]
    optimizer.step()
    if config.loss.max_scale is not None:
        with torch.no_grad():
            log_scale_of(model).clamp_(max=math.log(config.loss.max_scale))
    return StepResult(result.loss.detach(), result.correct, result.pairs, grad_norm.detach())
