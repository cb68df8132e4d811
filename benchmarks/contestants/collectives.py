"""What a loss sends: the collectives of a forward and backward on real processes, as torch.distributed dispatches them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.contestants.losses import pairs

# Of the bytes that a ring algorithm sends from each rank, as a multiple of the largest buffer: (W - 1) / W, or twice that.
RINGS = {"allgather": 1, "reduce_scatter": 1, "alltoall": 1, "allreduce": 2}


class Traffic(NamedTuple):
    """Collectives of a forward and backward, and the bytes that a ring sends from each rank for them."""

    collectives: int
    mib: float


class Counting(TorchDispatchMode):
    """Notes each collective: its kind, and the bytes of the larger of what it takes and gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__
            kind = next(kind for kind in RINGS if kind in name)
            sides = [sum(leaf.nbytes for leaf in tree_leaves(side) if isinstance(leaf, Tensor)) for side in args]
            self.seen.append((kind, max(sides)))
        return function(*args, **(kwargs or {}))


def nev(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """nev's loss, the texts in fp16 as sidecars hold them."""
    from nev.losses.contrastive import contrastive_loss

    return contrastive_loss(image, text if text.requires_grad else text.half(), log_scale).loss


def open_clip(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """open_clip's ClipLoss with --local-loss --gather-with-grad, its settings for large batches, as NCCL would be asked.

    (Of gloo, torch asks a scatter from each rank instead of the reduce-scatter.)
    """
    from open_clip.loss import ClipLoss

    dist.get_backend = lambda group=None: dist.Backend.NCCL
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=dist.get_rank(), world_size=dist.get_world_size())
    found: Tensor = loss(image, text, log_scale.exp())
    return found


CONTESTANTS = {"nev": nev, "open_clip": open_clip}


def traffic(name: str, world: int, rows: int, width: int, locked: bool) -> Traffic:
    """The traffic of one step's loss on `world` gloo processes of `rows` pairs each; the texts locked, or with a gradient."""
    queue = mp.get_context("spawn").SimpleQueue()
    with tempfile.NamedTemporaryFile() as store:
        mp.start_processes(_rank, (store.name, world, name, rows, width, locked, queue), nprocs=world)
    seen = queue.get()
    share = (world - 1) / world
    return Traffic(len(seen), sum(RINGS[kind] * share * nbytes for kind, nbytes in seen) / 2**20)


def _rank(rank: int, store: str, world: int, name: str, rows: int, width: int, locked: bool, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    loss: Callable[..., Tensor] = CONTESTANTS[name]
    image, text, log_scale = pairs(rows, width)
    text.requires_grad_(not locked)
    with Counting() as counting:
        torch.autograd.backward(loss(image, text, log_scale))
    if rank == 0:
        queue.put(counting.seen)
    dist.barrier()
    dist.destroy_process_group()
