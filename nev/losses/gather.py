"""The other side of every rank's pairs, brought here while this rank does something else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class AsyncGather:
    """Rows of all ranks that are on their way. Made by `gather`; `arrived` waits for them.

    own: [b, D], this rank's; valid: bool [b]; group: the ranks that take part; first: the number of this rank's first row among
    the N; world: W.
    """

    own: Tensor
    valid: Tensor
    group: dist.ProcessGroup | None
    first: int
    world: int
    _packed: Tensor | None
    _work: dist.Work | None

    def wait(self) -> tuple[Tensor, Tensor]:
        """The rows of all ranks [N, D], detached, in their own dtype and rank order, and bool [N]: which are valid."""
        if self._packed is None:
            return self.own.detach(), self.valid
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._packed[:, :-1], self._packed[:, -1] == 1


def gather(own: Tensor, valid: Tensor | None = None, group: dist.ProcessGroup | None = None) -> AsyncGather:
    """Start to gather own [b, D] and valid (bool [b]; None: all) of all ranks: one collective, none where W = 1.

    What is sent has the dtype of `own`, and `valid` rides as a column. b, D and that dtype must be equal on every rank; no
    collective is spent on checking it (gloo aborts on a difference, NCCL does not say what happens).
    """
    if valid is None:
        valid = torch.ones(len(own), dtype=torch.bool, device=own.device)
    rank, world = place(group)
    if world == 1:
        return AsyncGather(own, valid, group, 0, 1, None, None)
    packed = torch.cat([own.detach(), valid[:, None].to(own.dtype)], dim=1)
    gathered = packed.new_empty(world * len(packed), packed.shape[1])
    work = dist.all_gather_into_tensor(gathered, packed, group, async_op=True)
    return AsyncGather(own, valid, group, rank * len(own), world, gathered, work)


def place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(rank, W) in `group`, or (0, 1) for a process alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)
