"""Embedding and searching, each in a process of its own: pictures a second, seconds, and memory at the peak."""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.contestants.losses import resident_mib
from benchmarks.contestants.processes import run_script

FORWARD_IMAGES = 2048
BATCH = 128


class Search(NamedTuple):
    """seconds: of both ways; gib: taken at the peak beside the embeddings."""

    seconds: float
    gib: float


def through_ray(checkpoint: str, tars: str) -> float:
    """Pictures a second of `nev.embed.images`, from the first ones that come to the last."""
    from nev.cluster.session import connect
    from nev.embed.embedder import Embedder
    from nev.embed.images import embed_all
    from nev.eval.suite.collection import make_embed_job
    from nev.eval.suite.reading import make_reading
    from nev.eval.suite.schema import Task

    embedder = Embedder.from_checkpoint(checkpoint)
    config = embedder.config
    source = {"format": "webdataset", "input": tars}
    task = Task.model_validate({"name": "flickr8k", "kind": "retrieval", "source": source})
    reading = make_reading(task, "/", config.data.image_size, config.data.limits, os.cpu_count() or 1)
    tower = embedder.encoder_spec()
    connect()
    seen: list[tuple[float, int]] = []
    pixels = BATCH * config.data.image_size**2 * 3
    for _ in embed_all([make_embed_job(reading)], tower, pixels, lambda rows: seen.append((time.perf_counter(), rows))):
        pass
    # What had come when both processes were at work is not counted, nor is the time until then.
    first = 2 * (os.cpu_count() or 1)
    return sum(rows for _, rows in seen[first:]) / (seen[-1][0] - seen[first - 1][0])


def bare_forward(checkpoint: str) -> float:
    """Pictures a second of the tower alone, a process a core."""
    cores = os.cpu_count() or 1
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        return sum(pool.map(_forward, [checkpoint] * cores))


def _forward(checkpoint: str) -> float:
    import torch

    from nev.embed.embedder import Embedder
    from nev.models.vision import normalise

    torch.set_num_threads(1)
    embedder = Embedder.from_checkpoint(checkpoint)
    data = embedder.config.data
    vision = embedder.encoder_spec().load().eval()
    images = torch.randint(0, 256, (BATCH, data.image_size, data.image_size, 3), dtype=torch.uint8)
    with torch.inference_mode():
        vision(normalise(images, data.mean, data.std))
        begin = time.perf_counter()
        for _ in range(FORWARD_IMAGES // BATCH):
            vision(normalise(images, data.mean, data.std))
    return FORWARD_IMAGES / (time.perf_counter() - begin)


def quick_suite(checkpoint: str, data: Path, output: Path) -> None:
    """The command of a user."""
    run_script(
        "pipelines/evaluate.py",
        "--checkpoint",
        checkpoint,
        "--suite",
        "quick",
        "--data",
        str(data),
        "--output",
        str(output),
    )


def search(rows: int, width: int) -> Search:
    """Ranks of so many texts and images, both ways."""
    from nev.eval.metrics.retrieval import retrieval_ranks

    rng = np.random.default_rng(0)
    sides = []
    for _ in range(2):
        side = rng.standard_normal((rows, width), dtype=np.float32)
        side /= np.linalg.norm(side, axis=1, keepdims=True)
        sides.append(side)
    owner = np.arange(rows)
    retrieval_ranks(sides[0][:2000], sides[1][:2000], owner[:2000])  # libraries are loaded, threads are there
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, begin = resident_mib("VmRSS"), time.perf_counter()
    retrieval_ranks(*sides, owner)
    return Search(time.perf_counter() - begin, (resident_mib("VmHWM") - before) / 1024)
