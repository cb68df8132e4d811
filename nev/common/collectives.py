"""Collectives of Python objects over the W ranks of torch.distributed. Nothing is sent where W = 1."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def gather_objects(value: T, world: int) -> list[T]:
    """The `value` of every rank, in rank order, on every rank. Every rank calls this: one collective."""
    if world == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def gather_on_rank_0(value: T, rank: int, world: int) -> list[T]:
    """The `value` of every rank, in rank order, on rank 0; an empty list on the other ranks. One collective."""
    if world == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world if rank == 0 else []
    dist.gather_object(value, values if rank == 0 else None)
    return values


def broadcast_object(value: T, world: int) -> T:
    """The `value` of rank 0, on every rank. Every rank calls this: one collective."""
    if world == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def first_error(error: T | None, world: int) -> T | None:
    """The error of the lowest rank that has an error, on every rank; None where no rank has one. One collective."""
    return next((each for each in gather_objects(error, world) if each is not None), None)
