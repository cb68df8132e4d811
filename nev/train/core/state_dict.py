"""The tensors of a model and its optimiser for a checkpoint, by name: gathered from all ranks, and loaded again."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nev.common.collectives import broadcast_object
from nev.train.core.parallel import full_tensor, local_shard


class Tensors(NamedTuple):
    """Tensors by name, on the CPU, contiguous.

    model: parameters and buffers.
    optimizer: `<parameter>/<slot>`, as `optimizer_tensors`.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def gather_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True, into: Tensors | None = None
) -> Tensors:
    """A copy of the tensors of a model and its optimiser. Every rank calls this: FSDP gathers one tensor after another.

    keep: whether this rank gets the copy; else the result is empty.
    into: the result of an earlier call, whose memory is used again. Pages of new memory cost more than the copy.
    """
    copied = into or Tensors({}, {})
    for source, target in zip((model.state_dict(), optimizer_tensors(model, optimizer)), copied, strict=True):
        for name, tensor in source.items():
            full = full_tensor(tensor).detach()
            if keep:
                if name not in target:
                    target[name] = torch.empty(full.shape, dtype=full.dtype, pin_memory=full.is_cuda)
                target[name].copy_(full, non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copied


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by `<parameter>/<slot>`. AdamW's slots are exp_avg, exp_avg_sq and step."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{slot}": value
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
    }


def unknown_parameters(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """The names of parameters that have an optimiser state in `tensors` and are not in the model, sorted."""
    return sorted({key.rpartition("/")[0] for key in tensors} - {name for name, _ in model.named_parameters()})


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], world: int) -> None:
    """Set the optimiser's state to rank 0's `optimizer_tensors`. Every rank calls this.

    tensors: on rank 0 whole tensors, removed as they are loaded; ignored on the other ranks.
    Rank 0 sends one tensor after another. A rank keeps its part where FSDP has split the parameter, so no rank but 0 ever has
    more than one whole tensor beside its own state.
    """
    shapes = broadcast_object({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}, world)
    parameters = dict(model.named_parameters())
    for name, (shape, dtype) in shapes.items():
        parameter_name, _, slot = name.rpartition("/")
        parameter = parameters[parameter_name]
        first = world == 1 or dist.get_rank() == 0
        tensor = (tensors.pop(name) if first else torch.empty(shape, dtype=dtype)).to(parameter.device)
        if world > 1:
            dist.broadcast(tensor, src=0)
        # AdamW's `step` is 0-d, float32, and never split; fused AdamW needs every slot on the parameter's device.
        optimizer.state[parameter][slot] = local_shard(tensor, parameter) if tensor.ndim else tensor
