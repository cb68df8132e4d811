"""Random states: each rank has its own, and a checkpoint holds those of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from nev.common.collectives import gather_objects


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The states of this process's generators, uint8 [n], by generator: `cpu`, and `cuda` where `device` is a GPU."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Set the generators to `states` of `rng_state`. A generator without a state there stays as it is."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def gather_rng(device: torch.device, world: int) -> dict[str, Tensor]:
    """The states of all ranks by `<rank>/<generator>`, on every rank. One collective, none where W = 1."""
    states = gather_objects(rng_state(device), world)
    return {f"{rank}/{name}": state for rank, generators in enumerate(states) for name, state in generators.items()}


def restore_rng(states: dict[str, Tensor], rank: int, device: torch.device, seed: int, step: int) -> None:
    """Set this rank's generators to the states of `gather_rng`.

    A generator without a state there draws from (seed, step, rank): the checkpoint has another world size, or was written by
    a CPU run and this rank has a GPU.
    """
    seed_rank(rank, seed, step)
    prefix = f"{rank}/"
    set_rng_state({name.removeprefix(prefix): states[name] for name in states if name.startswith(prefix)}, device)


def seed_rank(rank: int, seed: int, step: int) -> None:
    """Seed all generators for dropout and drop-path, differently on each rank. Weights are drawn before, alike on all ranks."""
    torch.manual_seed(hash((seed, step, rank)) % 2**63)
