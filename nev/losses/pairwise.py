"""What all losses over pairs share: the result, the checks of the input, and gradients that the forward computes. torch only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nev.losses.gather import AsyncGather, start_gather


class LossOutput(NamedTuple):
    """The loss of the global batch, two counts of it, and this rank's terms. The first three are 0-d and equal on every rank.

    loss: float32 (float64 for float64 inputs), differentiable in `image`, `log_scale`, and in a `text` that requires a gradient.
    correct: int64, number of valid images whose own text has the highest score of all valid texts. Of texts with equal scores
        the first one counts: collapsed embeddings score 1 of N, and of several images with one caption one can be correct.
        Detached.
    pairs: int64, N, number of valid pairs. Detached.
    terms: [b], the part of each of this rank's pairs in the loss, 0 for invalid ones. All ranks' terms sum to N times the loss.
        Detached.
    """

    loss: Tensor
    correct: Tensor
    pairs: Tensor
    terms: Tensor


class LossAndGrads(NamedTuple):
    """The fields of `LossOutput`, and d loss / d input for each input, in their order; None where no gradient is required."""

    loss: Tensor
    correct: Tensor
    pairs: Tensor
    terms: Tensor
    gradients: tuple[Tensor | None, ...]


class PrecomputedGradient(torch.autograd.Function):
    """apply(compute, *inputs): the loss, counts and terms of `compute()`, whose gradients are saved for the backward."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], LossAndGrads], *inputs: Tensor) -> tuple[Tensor, ...]:
        """The fields of `LossOutput`. `compute` runs without autocast."""
        with torch.autocast(inputs[0].device.type, enabled=False):
            *output, gradients = compute()
        ctx.save_for_backward(*gradients)
        ctx.dtypes = tuple(tensor.dtype for tensor in inputs)
        ctx.mark_non_differentiable(*output[1:])
        return tuple(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The saved gradients, times the gradient of the loss."""
        # Converted last: a gradient of 1/N underflows in fp16 unless a loss scaler has enlarged it first.
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, *(None if grad is None else (grad_loss * grad).to(dtype) for grad, dtype in saved)


def gather_texts(
    image: Tensor, text: Tensor | AsyncGather, log_scale: Tensor, valid: Tensor | None, group: dist.ProcessGroup | None
) -> AsyncGather:
    """Check the inputs of a loss and start to gather the texts. Raises ValueError for inputs that do not fit together."""
    if not isinstance(text, AsyncGather):
        _check(image, text, log_scale, valid)
        return start_gather(text, valid, group)
    if valid is not None or group is not None:
        raise ValueError("valid and group belong to the texts that were gathered: give them to start_gather")
    _check(image, text.local, log_scale, text.valid)
    return text


def upcast(image: Tensor, texts: AsyncGather) -> Tensor:
    """The images in the dtype of the computation, at least float32, with 0 in invalid rows.

    The numbers of an invalid row must not reach a product, not even with weight 0: NaN * 0 is NaN.
    """
    dtype = torch.promote_types(torch.promote_types(image.dtype, texts.local.dtype), torch.float32)
    x = image.to(dtype)
    return x if all_valid(texts.valid) else x.masked_fill(~texts.valid[:, None], 0)


def all_valid(valid: Tensor) -> bool:
    """Whether all rows are valid. False on a GPU, for whose answer the host would wait."""
    return valid.device.type == "cpu" and bool(valid.all())


def local_share(parts: Tensor, gathering: AsyncGather) -> Tensor:
    """This rank's rows of the sum over the ranks of `parts` [N, D]: [b, D]. One reduce_scatter, none where W = 1."""
    if gathering.world == 1:
        return parts
    local = parts.new_empty(len(parts) // gathering.world, parts.shape[1])
    dist.reduce_scatter_tensor(local, parts, dist.ReduceOp.SUM, gathering.group)
    return local


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
