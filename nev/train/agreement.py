"""Whether to leave, asked of every rank after each step: a machine that is taken away is told to some of them first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class Agreement:
    """All ranks leave after the same step, or none. asked: whether this one was told to.

    One all-reduce of a byte a call, none where W = 1. It is one of hosts (gloo): no rank's GPU is waited for.
    """

    def __init__(self, world: int, asked: Callable[[], bool]) -> None:
        self._asked = asked
        self._group: Any = dist.new_group(backend="gloo") if world > 1 else None

    def reached(self) -> bool:
        """Whether any rank was asked: the same on all, which call this together."""
        if self._group is None:
            return self._asked()
        flag = torch.tensor([self._asked()], dtype=torch.uint8)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag)
