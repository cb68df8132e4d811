"""Functions on several ranks: real processes, joined by gloo."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Imported once, in the fork server, and not in each process, where they would take 6 s of CPU.
PRELOADED = ["nev.train.worker.loop", "transformers.models.bert.modeling_bert", "hypothesis", "pytest"]


def on_ranks(work: Callable[[int], Any], world: int, folder: Path) -> list[Any]:
    """What `work(rank)` returns on each of `world` ranks: tensors and plain data, carried in files under `folder`."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(_rank, (work, world, str(folder)), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _rank(rank: int, work: Callable[[int], Any], world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(work(rank), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
