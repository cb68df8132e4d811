"""A model on W ranks: whole on every rank (DDP), or a W-th of the towers' weights on each rank (`train.fsdp`: FSDP2).

Under FSDP2 (`fully_shard`; Zhao et al. 2023, arXiv 2304.11277) the rows of every weight, of its gradient and of its moments
are split over the ranks. The weights of a block are gathered before its forward and again before its backward, and dropped
afterwards. The result is DDP's, to rounding. The logit scale and the bias stay whole on every rank, because FSDP2 takes no 0-d
parameter; `clip_gradients` averages their gradients.
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
        for block in reversed(transformer_blocks(tower)):  # inner blocks first
            fully_shard(block, mesh=mesh)
        fully_shard(tower, mesh=mesh)


def transformer_blocks(tower: nn.Module) -> list[nn.Module]:
    """The modules that FSDP gathers in one piece, outer modules first: the layers of each list of layers that have layers."""
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    elements = [element for layers in lists for element in layers if any(True for _ in element.children())]
    return [block for block in elements if any(True for _ in block.parameters())]


def unwrap(model: nn.Module) -> nn.Module:
    """The model without DDP around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank has only a part of the tensor. Tests for a method of DTensor, whose import takes a second."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor. For a sharded tensor every rank calls this: one collective."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def local_shard(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor that is equal on every rank. No collective.

    like: the tensor whose device, strides and split the part has.
    """
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
    """Scale all gradients so that their norm is at most `limit`. Returns the norm before that, 0-d.

    Under FSDP the gradients of parameters that are not split are averaged over the ranks first. Every rank calls this.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    kinds = [[p for p in trained if not is_sharded(p)], [p for p in trained if is_sharded(p)]]
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
    present = [gradient for gradient in gradients if gradient is not None]
    if not present:
        return
    means = torch.stack(present)
    dist.all_reduce(means)
    means /= dist.get_world_size()
    for gradient, mean in zip(present, means, strict=True):
        gradient.copy_(mean)
