"""What a step pays for metrics: the calls that nev makes for a step, in a rank and in the driver, on a Ray that collects them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from benchmarks.contestants import steps

BLOCKS = 2  # of a rank's share of a step
PHASES = {"data": 0.01, "compute": 0.1, "checkpoint": 0.01, "validation": 0.01}
QUICKSTART: dict[str, Any] = {"patch_size": 12, "embed_dim": 128, "depth": 4, "num_heads": 4}


@contextmanager
def ray_with_metrics() -> Iterator[None]:
    """A Ray on this machine that collects metrics, as a cluster does."""
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def metrics_us(count: int, log_every: int) -> float:
    """Microseconds of a step's clock and exports, rank and driver together, over `count` steps."""
    import torch

    from nev.cluster.metrics import Instruments
    from nev.train.driver.run_metrics import RunMetrics
    from nev.train.messages import Metrics
    from nev.train.worker.meters import StepClock
    from nev.train.worker.rank_metrics import make_export

    rank: Any = SimpleNamespace(rank=0, device=torch.device("cpu"))
    job: Any = SimpleNamespace(config=SimpleNamespace(name="cost"), flops=None)
    export, clock = make_export(job, rank), StepClock(0)
    run = RunMetrics(Instruments({"run": "cost"}), 0, time.time())
    begin = time.perf_counter()
    for step in range(1, count + 1):
        for _ in range(BLOCKS):
            with clock.waiting():
                pass
            clock.add_rows(128)
        if step % log_every == 0:
            clock.metrics(step, 256)
            interval = clock.take()
            interval.seconds.update(PHASES)  # the most phases that an interval has
            export(interval)
            run.observe(Metrics(step, {"loss": 1.0, "bad_rows": 0.0}))
    return 1e6 * (time.perf_counter() - begin) / count


def step_us(count: int) -> float:
    """Microseconds of a step of the quickstart's tower on a rank's 128 pictures of 48 px: the smallest step that nev ships."""
    config = steps.experiment(128, None)
    vision = config.vision.model_copy(update={"trunk_args": QUICKSTART})
    data = config.data.model_copy(update={"image_size": 48})
    config = config.model_copy(update={"vision": vision, "data": data})
    return 1e6 * steps.cost_of(config, count).seconds / count
