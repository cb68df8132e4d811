"""The ranks agree after every step whether to stop: a machine that is taken away notifies only some of them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class StopConsensus:
    """All ranks stop after the same step, or none.

    local_stop: whether this rank received a stop request.
    timeout_s: the longest wait for another rank.
    Each call is one all-reduce of a byte, none where W = 1. The group is gloo's, so no rank waits for its GPU.
    """

    def __init__(self, world: int, local_stop: Callable[[], bool], timeout_s: float) -> None:
        self._local_stop = local_stop
        self._group: Any = None
        if world > 1:  # a new group does not inherit the timeout of the default group
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def should_stop(self) -> bool:
        """Whether any rank received a stop request. Every rank calls this, and gets the same answer."""
        if self._group is None:
            return self._local_stop()
        flag = torch.tensor([self._local_stop()], dtype=torch.uint8)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag)
