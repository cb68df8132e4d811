"""An asynchronous all-gather of the texts (or images) of every rank's pairs: it runs while this rank embeds the other side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class AsyncGather:
    """The all-gather that `start_gather` has started; `wait` returns the rows of all ranks.

    local: [b, D], this rank's rows, with their graph.
    valid: bool [b], which of this rank's rows are valid.
    group: the ranks that take part.
    first: the number of this rank's first row among the N rows.
    world: W, the number of ranks.
    """

    local: Tensor
    valid: Tensor
    group: dist.ProcessGroup | None
    first: int
    world: int
    _packed: Tensor | None
    _work: dist.Work | None

    def wait(self) -> tuple[Tensor, Tensor]:
        """The rows of all ranks, detached, in their dtype and in rank order, [N, D]; and which are valid, bool [N]."""
        if self._packed is None:
            return self.local.detach(), self.valid
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._packed[:, :-1], self._packed[:, -1] == 1


def start_gather(local: Tensor, valid: Tensor | None = None, group: dist.ProcessGroup | None = None) -> AsyncGather:
    """Start to gather the rows of all ranks: one collective, none where W = 1.

    local: [b, D], this rank's rows. b, D and the dtype must be equal on every rank. No collective checks this (with a difference
        gloo aborts, and NCCL's behaviour is undefined).
    valid: bool [b], sent as one more column of `local`. None: all rows are valid.
    """
    if valid is None:
        valid = torch.ones(len(local), dtype=torch.bool, device=local.device)
    rank, world = rank_and_world(group)
    if world == 1:
        return AsyncGather(local, valid, group, 0, 1, None, None)
    packed = torch.cat([local.detach(), valid[:, None].to(local.dtype)], dim=1)
    gathered = packed.new_empty(world * len(packed), packed.shape[1])
    work = dist.all_gather_into_tensor(gathered, packed, group, async_op=True)
    return AsyncGather(local, valid, group, rank * len(local), world, gathered, work)


def rank_and_world(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(rank, W) in `group`, or (0, 1) for a process alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)
