"""The gradient of a batch of which only a part fits in memory (GradCache: Gao et al. 2021, arXiv 2101.06983).

The loss needs the embeddings of the whole batch; the graph behind an embedding is needed only for the backward. So:

    1. embed each part without a graph,                                            b images forward
    2. compute the loss of all embeddings, and its gradient in the embeddings,     no model
    3. embed each part again with its graph, and backpropagate its rows of that gradient.     b images forward and backward

A forward costs 1 and a backward 2, so this is 4/3 of the work of a plain step, in the memory of one part. The gradient is that
of a plain step. A part has the same dropout both times, since its random state is restored before the second time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nev.config.base import ConfigError
from nev.losses.pairwise import LossOutput
from nev.models.dual_encoder import Embedded
from nev.train.core.parallel import unwrap
from nev.train.core.rng import rng_state, set_rng_state

Embed = Callable[[nn.Module, slice], Embedded]
Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], LossOutput]


def backward_in_parts(
    model: nn.Module, parts: Sequence[slice], embed: Embed, loss: Loss, device: torch.device
) -> LossOutput:
    """Compute the loss of a batch, and add its gradient to the parameters of `model`.

    model: without batch norm (`refuse_batch_norm`). DDP reduces the gradients once, with the last part. FSDP reduces them with
    each part, since a rank has no room for whole gradients.
    parts: the rows of the batch, in order, equally many in each part.
    embed: (model, part) to unit vectors [rows, D] of each trained side, and the 0-d parameters that the loss takes (the log of
    the logit scale, ...).
    loss: (vectors of the whole batch for each trained side, 0-d parameters) to the loss.
    """
    states, vectors_by_part = [], []
    with torch.no_grad():
        for part in parts:
            states.append(rng_state(device))
            vectors, scalars = embed(unwrap(model), part)
            vectors_by_part.append(vectors)
    embeddings = [torch.cat(side).requires_grad_() for side in zip(*vectors_by_part, strict=True)]
    del vectors_by_part
    leaves = [scalar.detach().requires_grad_() for scalar in scalars]
    result = loss(embeddings, leaves)
    gradients = torch.autograd.grad(result.loss, (*embeddings, *leaves))
    sides, scalar_gradients = gradients[: len(embeddings)], gradients[len(embeddings) :]
    for number, (part, state) in enumerate(zip(parts, states, strict=True)):
        set_rng_state(state, device)
        last = number == len(parts) - 1
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
            vectors, scalars = embed(model, part)
            ends = list(zip(vectors, (side[part] for side in sides), strict=True))
            ends += zip(scalars, scalar_gradients, strict=True) if last else ()
            trained = [end for end in ends if end[0].requires_grad]
            torch.autograd.backward([tensor for tensor, _ in trained], [gradient for _, gradient in trained])
    return result


def refuse_batch_norm(model: nn.Module, setting: str) -> None:
    """Raise ConfigError for a batch norm in training mode. setting: the setting that excludes batch norms.

    With GradCache a batch norm would see a part of the batch; under FSDP each rank would have its own statistics.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ConfigError(
                f"{setting}: {name} is a batch norm, whose result depends on the other images of its batch: {setting} would "
                f"change the model. Choose a trunk without batch norm, or leave {setting} out."
            )
