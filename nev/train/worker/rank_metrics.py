"""What a rank exports to Ray's metrics: steps, images, time by phase, and its share of the GPU's peak."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nev.cluster.metrics import IMAGES, MFU, PHASE_SECONDS, STEPS, Instruments
from nev.planner.hardware import peak_flops
from nev.train.job import Job
from nev.train.worker.meters import Interval
from nev.train.worker.state import RankContext


def make_export(job: Job, ctx: RankContext) -> Callable[[Interval], None]:
    """The function that exports an interval of this rank. Some ten records, 2 µs each."""
    instruments = Instruments({"run": job.config.name, "rank": str(ctx.rank)})
    peak = find_peak(ctx)

    def export(interval: Interval) -> None:
        instruments.add(STEPS, interval.steps)
        instruments.add(IMAGES, interval.images)
        for phase, seconds in interval.seconds.items():
            instruments.add(PHASE_SECONDS, seconds, phase=phase)
        if job.flops and peak and interval.steps:
            instruments.set(MFU, compute_mfu(interval, job.flops, peak))

    return export


def find_peak(ctx: RankContext) -> float | None:
    """Dense bf16 FLOP/s of this rank's GPU; None on a CPU, for a GPU that is not known, and for a rank in float32."""
    if ctx.device.type != "cuda" or ctx.precision.dtype != torch.bfloat16:
        return None
    return peak_flops(torch.cuda.get_device_name(ctx.device))


def compute_mfu(interval: Interval, flops: float, peak: float) -> float:
    """The share of a GPU's peak that an interval's steps have used. Validation and checkpoints do not count.

    flops: of a step for an image. peak: FLOP/s.
    """
    return flops * interval.images / (interval.step_seconds * peak)
