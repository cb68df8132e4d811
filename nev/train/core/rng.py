"""Random states: each rank has its own, and a checkpoint holds them all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """This process's random states, uint8 [n]."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `rng_state` gave, here or on a machine with another device."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def gather_rng(device: torch.device, world: int) -> dict[str, Tensor]:
    """The states of all ranks by `<rank>/<name>`, on every rank. One gather of objects, none where W = 1."""
    states: list[Any] = [rng_state(device)]
    if world > 1:
        states = [None] * world
        dist.all_gather_object(states, rng_state(device))
    return {f"{rank}/{name}": value for rank, own in enumerate(states) for name, value in own.items()}


def restore_rng(states: dict[str, Tensor], rank: int, device: torch.device, seed: int, step: int) -> None:
    """Put back this rank's states; a rank that had none (another world size) draws from (seed, step, rank)."""
    own = {name.partition("/")[2]: value for name, value in states.items() if name.partition("/")[0] == str(rank)}
    if "cpu" not in own:
        seed_rank(rank, seed, step)
        return
    set_rng_state(own, device)


def seed_rank(rank: int, seed: int, step: int) -> None:
    """Seed dropout and drop-path, differently on each rank (the weights were drawn before, alike on all)."""
    torch.manual_seed(hash((seed, step, rank)) % 2**63)
