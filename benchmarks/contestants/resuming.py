"""Four ranks that start from one checkpoint, and the host memory that all of them take together at the peak."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

from nev.config.experiment import Experiment
from nev.config.file import parse

WORLD, STEP, WIDTH = 4, 1, 768
PAUSE_S = 0.02  # between two looks at the memory


def experiment(fsdp: bool = False) -> Experiment:
    """A ViT-B/16 at 224 px."""
    return parse(
        Experiment,
        {
            "name": "resume",
            "data": {"train": "none", "image_size": 224, "block_rows": 4},
            "vision": {"trunk": "vit_base_patch16_224", "pool": "map"},
            "optim": {"lr": 1e-4},
            "train": {"global_batch": 16, "steps": 2, "precision": "fp32", "fsdp": fsdp},
            "workers": {"count": WORLD},
        },
    )


def write_checkpoint(folder: str) -> None:
    """A checkpoint of step 1, with both moments of every parameter. To be called in a process of its own."""
    import torch

    from nev.runs import checkpoint
    from nev.runs.manifest import CheckpointState
    from nev.train.core.optim import make_optimizer
    from nev.train.core.rng import gather_rng
    from nev.train.core.state_dict import gather_tensors
    from nev.train.worker.state import build_model

    config = experiment()
    model, _ = build_model(_job(config, folder), replaced=True)
    optimizer = make_optimizer(model, config.optim)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = CheckpointState(STEP, config.model_dump(mode="json"), {}, {}, WORLD, 0, {})
    checkpoint.save(folder, state, gather_tensors(model, optimizer), gather_rng(torch.device("cpu"), 1))


def peak_mib(way: str, folder: str) -> float:
    """The peak of the proportional set size, summed over the ranks, in MiB, while they start from the checkpoint.

    way: "shared" and "shared_fsdp", as nev starts; "each_rank", where every rank reads the checkpoint whole.
    """
    context = multiprocessing.get_context("spawn")
    rendezvous = f"{folder}/rendezvous-{time.monotonic_ns()}"
    ready = context.Barrier(WORLD + 1)
    ranks = [context.Process(target=_rank, args=(rank, way, folder, rendezvous, ready)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    ready.wait(300)  # every rank has imported all it needs
    peak = 0.0
    while any(process.is_alive() for process in ranks):
        peak = max(peak, sum(_proportional_mib(process.pid) for process in ranks))
        time.sleep(PAUSE_S)
    if any(process.exitcode for process in ranks):
        raise RuntimeError(f"{way}: a rank has failed; its traceback stands above")
    return peak


def _rank(rank: int, way: str, folder: str, rendezvous: str, ready: Any) -> None:
    import torch
    import torch._dynamo
    import torch.distributed as dist

    from nev.models.precision import choose_precision
    from nev.train.worker.state import RankContext, load_model, make_train_state

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    device = torch.device("cpu")
    job, ctx = (
        _job(experiment(way == "shared_fsdp"), folder),
        RankContext(rank, WORLD, device, choose_precision("fp32", device)),
    )
    ready.wait(300)
    if way == "each_rank":
        _start_from_own_copy(job, ctx)
    else:
        make_train_state(load_model(job, ctx, STEP), job, ctx)
    dist.barrier()
    dist.destroy_process_group()


def _start_from_own_copy(job: Any, ctx: Any) -> None:
    """A start in which every rank reads the checkpoint whole and keeps it until its optimiser has the moments."""
    from nev.runs import checkpoint
    from nev.runs.manifest import checkpoint_location
    from nev.train.core.optim import make_optimizer
    from nev.train.core.parallel import distribute
    from nev.train.core.state_dict import load_optimizer
    from nev.train.worker.state import build_model

    location = checkpoint_location(job.run, STEP)
    _, weights = checkpoint.load_model(location)
    moments, _ = checkpoint.load_training_state(location)
    model, _ = build_model(job, replaced=True)
    model.load_state_dict(weights)
    distribute(model, False, ctx.world, ctx.device)
    optimizer = make_optimizer(model, job.config.optim)
    load_optimizer(model, optimizer, dict(moments), 1)  # a copy of the dict: the tensors live until the end


def _job(config: Experiment, folder: str) -> Any:
    from nev.train.job import Job

    plan: Any = None  # no step is taken
    return Job(config, folder, plan, (), WIDTH, 2, 2, None, {})


def _proportional_mib(pid: int | None) -> float:
    """Memory of a process, where pages that several processes share count in parts; 0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
