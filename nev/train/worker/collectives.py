"""Whether to leave, local_stop of every rank after each step: a machine that is taken away is told to some of them first."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class StopConsensus:
    """All ranks leave after the same step, or none. local_stop: whether this one was told to. timeout_s: how long one waits.

    One all-reduce of a byte a call, none where W = 1. It is one of hosts (gloo): no rank's GPU is waited for.
    """

    def __init__(self, world: int, local_stop: Callable[[], bool], timeout_s: float) -> None:
        self._asked = local_stop
        self._group: Any = None
        if world > 1:  # the timeout of the group that all are in is not taken over
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def should_stop(self) -> bool:
        """Whether any rank was local_stop: the same on all, which call this together."""
        if self._group is None:
            return self._asked()
        flag = torch.tensor([self._asked()], dtype=torch.uint8)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag)


def gather_distinct(value: int, world: int) -> set[int]:
    """The values that the ranks have. One gather of objects, none where W = 1."""
    values: list[int] = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return set(values)


def first_error(problem: str | None, world: int) -> str | None:
    """The first rank's problem, if any rank has one. One gather of objects, none where W = 1."""
    if world == 1:
        return problem
    problems: list[str | None] = [None] * world
    dist.all_gather_object(problems, problem)
    return next((found for found in problems if found), None)
