"""The gradient of a batch of which only a part fits in memory (GradCache: Gao et al. 2021, arXiv 2101.06983).

The loss needs the embeddings of the whole batch, but the graph behind them only to carry its gradient back. So:

    1. embed part after part without a graph,                       b images forward
    2. take the loss of all embeddings, and its gradient in them,   no model
    3. embed each part again, with its graph, and send its share of that gradient back.     b images forward and backward

Forward costs 1 and backward 2, so 4/3 of the plain step's work, in the memory of one part. The result is the plain step's, with
the dropout of one forward a part: each part draws the same twice, its random state being put back before the second time.
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
    """The loss of a batch, its gradient added to the parameters of `model`.

    parts: equally many rows each, all of them in order. embed(model, part): unit vectors [rows, D] of each side that is
    trained, and scalars of the model that the loss takes beside them (the log of the logit scale, 0-d, ...); loss(vectors,
    scalars) with the vectors of all parts. `model` may be under DDP, which reduces its gradients once, with the last part, or
    under FSDP, which does so with each: it has no room for whole ones. It must have no batch norm (`refuse_batch_norm`).
    """
    states, found = [], []
    with torch.no_grad():
        for part in parts:
            states.append(rng_state(device))
            vectors, scalars = embed(unwrap(model), part)
            found.append(vectors)
    embeddings = [torch.cat(side).requires_grad_() for side in zip(*found, strict=True)]
    del found
    leaves = [one.detach().requires_grad_() for one in scalars]
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
            wanted = [end for end in ends if end[0].requires_grad]
            torch.autograd.backward([tensor for tensor, _ in wanted], [wished for _, wished in wanted])
    return result


def refuse_batch_norm(model: nn.Module, setting: str) -> None:
    """Raise ConfigError, in the name of `setting`, for a layer that is trained and whose result depends on which images it sees.

    Parts would change what it sees, and FSDP would leave each rank its own statistics.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ConfigError(
                f"{setting}: {name} is a batch norm, whose result depends on the images beside each other: it would be another "
                f"model's. Choose a trunk without it, or leave {setting} out."
            )
