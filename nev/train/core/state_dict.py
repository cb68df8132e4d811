"""What a checkpoint holds of a model and its optimiser, as tensors by name: gathered from all ranks, and put back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nev.train.core.parallel import full_tensor, local_shard


class Tensors(NamedTuple):
    """By name: the model's parameters and buffers, and `<parameter>/<slot>` of the optimiser. On the CPU, contiguous."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def gather_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True, into: Tensors | None = None
) -> Tensors:
    """A copy of what a checkpoint holds of a model and its optimiser, empty unless `keep`.

    into: what an earlier call gave; its memory is filled again (pages of new memory cost more than the copy).
    Of what FSDP has split (`nev.train.core.parallel`) each rank gives its part, one tensor after another: every rank calls this.
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
    """The optimiser's state by parameter name: `<parameter>/<slot>`, as exp_avg, exp_avg_sq and step."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{slot}": value
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
    }


def unknown_parameters(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """The parameters of `optimizer_tensors` that the model lacks, sorted."""
    return sorted({key.rpartition("/")[0] for key in tensors} - {name for name, _ in model.named_parameters()})


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put `optimizer_tensors` back, whole as they are, into an optimiser whose parameters FSDP may have split."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, _, slot = key.rpartition("/")
        parameter = parameters[name]
        # AdamW keeps `step` as one number in float32; fused AdamW wants all on the parameter's device.
        optimizer.state[parameter][slot] = local_shard(value, parameter) if value.ndim else value.to(parameter.device)
