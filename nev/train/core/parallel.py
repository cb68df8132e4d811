"""How W ranks hold one model: each the whole of it (DDP), or each a W-th of the towers' weights (`train.fsdp`: FSDP2).

Under FSDP2 (`fully_shard`; Zhao et al. 2023, arXiv 2304.11277) the rows of every weight, of its gradient and of its moments
are split over the ranks. A block's weights are gathered before its forward and again before its backward, and dropped after
it. The result is DDP's to rounding. The numbers beside the towers (the logit scale, a bias) stay whole on every rank,
because FSDP2 takes no 0-d parameter: their gradients are averaged here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nev.models.dual_encoder import DualEncoder


def distribute(model: DualEncoder, fsdp: bool, world: int, device: torch.device) -> nn.Module:
    """Put the model on `device`, so that a backward makes its gradients the means over the W ranks. Every rank calls this.

    Returns the module that a forward calls: DDP around `model`; `model` itself under FSDP and where W = 1.
    Under FSDP the weights must be alike on every rank: each rank keeps its part of its own weights. DDP sends rank 0's weights
    to the other ranks. FSDP replaces the parameters by DTensors, so the optimiser is made after this call.
    """
    if fsdp and world > 1:
        _shard(model, world, device)
    model.to(device)
    if world == 1 or fsdp:
        return model
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def _shard(model: DualEncoder, world: int, device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world,))
    for tower in model.towers():
        for block in reversed(transformer_blocks(tower)):  # the inner ones first
            fully_shard(block, mesh=mesh)
        fully_shard(tower, mesh=mesh)


def transformer_blocks(tower: nn.Module) -> list[nn.Module]:
    """What is gathered in one piece: the elements of every list of layers that have layers themselves, outer ones first."""
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    elements = [element for one in lists for element in one if any(True for _ in element.children())]
    return [block for block in elements if any(True for _ in block.parameters())]


def unwrap(model: nn.Module) -> nn.Module:
    """The model without DDP around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank has a part of it alone. (DTensor by what it can: its import takes a second.)"""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """All of it. Of a sharded one every rank must ask."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def local_shard(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor (equal on every rank), as `like` lies: device, strides, split. No collective."""
    if not is_sharded(like):
        return torch.empty_like(like, dtype=full.dtype, requires_grad=False).copy_(full)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def broadcast_tensors(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Overwrite each tensor by rank 0's, one tensor after another. Every rank calls this with tensors of the same shapes.

    device: where the backend of torch.distributed takes tensors from (NCCL: this rank's GPU). A copy of one tensor at a time
    lies there.
    """
    for tensor in tensors:
        sent = tensor.detach().to(device).contiguous()
        dist.broadcast(sent, src=0)
        if sent.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(sent)


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Average what FSDP left apart, then scale all gradients so that their norm is at most `limit`. Returns it before, 0-d."""
    wanted = [parameter for parameter in parameters if parameter.grad is not None]
    kinds = [[p for p in wanted if not is_sharded(p)], [p for p in wanted if is_sharded(p)]]
    if kinds[1]:
        _average([parameter.grad for parameter in kinds[0]])
    kinds = [kind for kind in kinds if kind]
    norms = [full_tensor(nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in kinds]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, limit, norm)
    return norm


def _average(gradients: list[Tensor | None]) -> None:
    """Replace 0-d gradients by their means over the ranks: one all-reduce."""
    found = [gradient for gradient in gradients if gradient is not None]
    if not found:
        return
    together = torch.stack(found)
    dist.all_reduce(together)
    together /= dist.get_world_size()
    for gradient, mean in zip(found, together, strict=True):
        gradient.copy_(mean)
