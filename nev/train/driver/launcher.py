"""The driver's side of Ray Train: it starts the processes (`nev.train.worker.process`), and starts them again when they die."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from nev.cluster.ray_internals import first_cause, innermost, remove_leaked_placement_groups
from nev.common.errors import NevError
from nev.common.signals import Stopped, set_by_sigterm
from nev.config.experiment import Experiment
from nev.data.block import BlockReader
from nev.runs.manifest import with_retries
from nev.storage.files import join
from nev.train.driver.metrics import MetricsLogger
from nev.train.driver.monitor import TrainMonitor
from nev.train.driver.validator import Validator
from nev.train.job import Job, find_resume_point
from nev.train.worker.process import train_worker

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer


START_TRIES = (
    3  # of Ray's controller, each with a wait for room (`nev.cluster.session`), before `run_workers` looks at it again
)


class TrainingFailed(NevError, RuntimeError):
    """The run could not be finished. The message is the first cause, without Ray's frames."""


def run_workers(
    job: Job,
    begun: int,
    reader: BlockReader,
    board: Any,
    ledger: MetricsLogger,
    console: Console,
    validator: Validator | None,
) -> None:
    """Run the job on the connected Ray cluster, from its newest checkpoint, that of step `begun`, to `job.stop_step`.

    Or for as long as there is patience. Workers that had to leave (their machine is taken away) are started again. Raises
    TrainingFailed, and Stopped where a SIGTERM to this process ended it.
    """
    import ray.train
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    watcher = TrainMonitor(board, ledger, console, validator, job.total_steps, begun)
    try:
        with ray_folder(job.run) as folder, watcher.watching(), set_by_sigterm(watcher.stop):
            failures = 0
            while True:
                watcher.left = False
                try:
                    ray_trainer(job, reader, board, folder).fit()
                except ray.train.ControllerError as error:
                    # Ray starts processes again that die in training. It gives up where one dies while all of them meet, and
                    # where there was no room for a while: that is waited for as long as it takes.
                    if watcher.stop.is_set():
                        raise Stopped from error
                    remove_leaked_placement_groups()
                    failures += not isinstance(error.controller_failure, WorkerGroupStartupTimeoutError)
                    if failures > job.config.workers.max_failures or isinstance(innermost(error), NevError):
                        raise
                    continue
                watcher.read()
                if watcher.errors or watcher.stop.is_set() or watcher.enough.is_set() or not watcher.left:
                    break
    except ray.train.TrainingFailedError as error:
        raise TrainingFailed(first_cause(error)) from error
    except (
        SystemExit
    ) as end:  # of SIGTERM's handler here, or of Ray Train's for Ctrl-C; on its way out Ray makes a new one
        if watcher.stop.is_set():
            raise Stopped from end
        raise KeyboardInterrupt from end
    if watcher.errors:
        raise TrainingFailed(watcher.errors[0])
    if watcher.left and not watcher.enough.is_set():
        raise Stopped


def ray_trainer(job: Job, reader: BlockReader, board: Any, folder: str) -> TorchTrainer:
    """Ray's trainer of a job: it starts the workers, as many as there is room for between the least and the most."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from nev.data.stream import RoundRobinSplit

    workers = job.config.workers
    # Both are typed as the ones before, which knew less.
    scaling: Any = ray.train.ScalingConfig
    failing: Any = ray.train.FailureConfig
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "board": board},
        torch_config=TorchConfig(timeout_s=workers.timeout_s),
        scaling_config=scaling(
            num_workers=workers.most if workers.least == workers.most else (workers.least, workers.most),
            elastic_resize_monitor_interval_s=workers.resize_s,
            use_gpu=workers.gpus > 0,
            resources_per_worker=resources(job.config),
        ),
        run_config=ray.train.RunConfig(
            name=f"attempt-{int(time.time())}",
            storage_path=folder,
            failure_config=failing(workers.max_failures, controller_failure_limit=START_TRIES - 1),
        ),
        datasets={"train": lambda: stream_from_here(job, reader)},
        dataset_config=RoundRobinSplit(),
    )


@contextmanager
def ray_folder(run: str) -> Iterator[str]:
    """Ray Train's own storage: in the run's folder, or for a run on S3 a folder of this node that goes away.

    Ray writes no more than a marker there: the workers report no checkpoint to it, so they need not see the folder.
    """
    if not run.startswith("s3://"):
        yield join(run, "ray")
        return
    with tempfile.TemporaryDirectory(prefix="nev-ray-") as folder:
        yield folder


def resources(config: Experiment) -> dict[str, float]:
    """What one worker reserves. Ray wants some resource: a worker that shares the CPUs reserves memory alone."""
    workers = config.workers
    wanted = {"CPU": workers.cpus, "GPU": workers.gpus, "memory": float(workers.memory)}
    return {name: amount for name, amount in wanted.items() if amount}


def stream_from_here(job: Job, reader: BlockReader) -> Any:
    """Called by Ray Train at every start of the worker group: the stream from the latest checkpoint's step."""
    from nev.data.stream import make_stream

    return make_stream(reader, job.plan, with_retries(lambda: find_resume_point(job.run)).step, job.stop_step)
