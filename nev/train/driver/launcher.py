"""The driver's side of Ray Train: starts the workers (`nev.train.worker.process`), and starts them again when they die."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nev.cluster.ray_internals import (
    call_in_workers,
    find_root_error,
    first_cause,
    remove_leaked_placement_groups,
    startup_timed_out,
)
from nev.cluster.session import count_cpus, may_grow
from nev.cluster.waiting import wait_for_room
from nev.common.errors import NevError
from nev.common.signals import Stopped, handle_sigterm
from nev.config.experiment import Experiment
from nev.data.mixture_reader import Reader
from nev.runs.manifest import with_retries
from nev.storage.files import join
from nev.train.driver.monitor import TrainMonitor
from nev.train.job import Job, find_resume_point, name_stream
from nev.train.worker.process import train_worker

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

# Attempts of Ray's controller, each with a wait for free resources (`nev.common.quiet`), before `run_workers` gets its error.
START_TRIES = 3
LESS_ROOM = "lower workers.count, workers.cpus, workers.gpus or workers.memory"


class TrainingFailed(NevError, RuntimeError):
    """The run could not be finished. The message is the first cause, without Ray's frames."""


def run_workers(job: Job, reader: Reader, mailbox: Any, monitor: TrainMonitor, start_step: int) -> None:
    """Train on the connected Ray cluster, from `start_step` to `job.stop_step` or to an early stop.

    start_step: the step of a verified checkpoint, 0 for a new run. Every later attempt begins at the newest valid checkpoint.
    Workers that exit early because their machine is taken away are started again.
    Raises TrainingFailed, and Stopped if a SIGTERM to this process or a callback has ended training.
    """
    import ray.train

    try:
        with ray_folder(job.run) as folder, monitor.running(), handle_sigterm(monitor.stop_requested):
            failures = 0
            verified_step: int | None = start_step
            while True:
                monitor.workers_left = False
                if may_grow():
                    if not wait_for_room(
                        [needed_room(job.config)], monitor.show_wait, monitor.warn, monitor.ends, LESS_ROOM
                    ):
                        if monitor.early_stopped.is_set():
                            break
                        raise Stopped
                    monitor.show_wait("")
                streams, verified_step = make_streams(job, reader, mailbox, verified_step), None
                try:
                    ray_trainer(job, streams, mailbox, folder).fit()
                except ray.train.ControllerError as error:
                    if monitor.stop_requested.is_set() or monitor.ended_by_callback:
                        raise Stopped from error
                    remove_leaked_placement_groups()
                    failures += not startup_timed_out(error)
                    if gives_up(job.config, failures, error):
                        raise
                    continue
                monitor.poll()
                stopped = monitor.stop_requested.is_set() or monitor.early_stopped.is_set()
                if monitor.errors or stopped or monitor.ended_by_callback or not monitor.workers_left:
                    break
    except ray.train.TrainingFailedError as error:
        if monitor.ended_by_callback:
            raise Stopped from error
        raise TrainingFailed(first_cause(error)) from error
    except ray.exceptions.RayActorError as error:
        if monitor.ended_by_callback:  # the monitor has killed Ray Train's controller
            raise Stopped from error
        raise
    # From SIGTERM's handler, or from Ray Train's handler of Ctrl-C, whose error Ray raises again as SystemExit.
    except SystemExit as end:
        if monitor.stop_requested.is_set() or monitor.ended_by_callback:
            raise Stopped from end
        raise KeyboardInterrupt from end
    if monitor.ended_by_callback:
        raise Stopped
    if monitor.errors:
        raise TrainingFailed(monitor.errors[0])
    if monitor.workers_left and not monitor.early_stopped.is_set():
        raise Stopped


def gives_up(config: Experiment, failures: int, error: BaseException) -> bool:
    """Whether the run ends after a failure of Ray's controller.

    failures: workers that died while all of them connected. Ray itself restarts workers that die in training, and a wait for
        free resources is no failure: it has no limit.
    """
    most = config.workers.max_failures
    return isinstance(find_root_error(error), NevError) or (most >= 0 and failures > most)


def ray_trainer(job: Job, streams: dict[str, Any], mailbox: Any, folder: str) -> TorchTrainer:
    """Ray's trainer of a job: it starts as many workers as there is room for, between the least and the most.

    streams: of `make_streams`. Ray calls them at each attempt.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from nev.data.stream import RoundRobinSplit
    from nev.train.worker.blocks import start_fetching

    workers = job.config.workers
    # Ray's stubs are those of an older version, which has fewer arguments.
    scaling: Any = ray.train.ScalingConfig
    failing: Any = ray.train.FailureConfig
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "mailbox": mailbox},
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
            callbacks=[call_in_workers(start_fetching)],
            failure_config=failing(workers.max_failures, controller_failure_limit=START_TRIES - 1),
        ),
        datasets=streams,
        dataset_config=RoundRobinSplit(job.config.data.streams),
    )


@contextmanager
def ray_folder(run: str) -> Iterator[str]:
    """Ray Train's own storage: in the run's folder; for a run on S3, a temporary folder of this node.

    Ray writes no more than a marker there. The workers report no checkpoint to Ray, so they need not see the folder.
    """
    if not run.startswith("s3://"):
        yield join(run, "ray")
        return
    with tempfile.TemporaryDirectory(prefix="nev-ray-") as folder:
        yield folder


def resources(config: Experiment) -> dict[str, float]:
    """What one worker reserves. Ray requires one at least, so a worker without a CPU of its own reserves memory alone."""
    workers = config.workers
    amounts = {"CPU": workers.cpus, "GPU": workers.gpus, "memory": float(workers.memory)}
    return {name: amount for name, amount in amounts.items() if amount}


def needed_room(config: Experiment) -> list[dict[str, float]]:
    """What a run needs before its first step: the resources of each worker, and a CPU to decode where the workers take all."""
    workers = config.workers
    decode = [{"CPU": 1.0}] if count_cpus() < workers.least * workers.cpus + 1 else []
    return [resources(config)] * workers.least + decode


def make_streams(job: Job, reader: Reader, mailbox: Any, start_step: int | None) -> dict[str, Any]:
    """Make the functions that Ray Train's controller calls at each attempt, in order, before its workers run.

    Each function returns a stream of blocks. The first one posts the attempt's first step to the mailbox.
    start_step: the first step of the first attempt, whose checkpoint is verified. None: the newest valid checkpoint is looked
        for, as at every later attempt.
    """
    verified = [] if start_step is None else [start_step]
    count, made = job.config.data.streams, list[Any]()

    def take_stream(stream: int) -> Any:
        import ray

        from nev.data import stream as streams

        if stream == 0:  # an attempt begins
            step = verified.pop() if verified else with_retries(lambda: find_resume_point(job.run)).step
            ray.get(mailbox.set_start_step.remote(step))
            made[:] = streams.make_streams(reader, job.plan, step, job.stop_step, job.config.name, count)
        return made[stream]

    return {name_stream(stream): functools.partial(take_stream, stream) for stream in range(count)}
