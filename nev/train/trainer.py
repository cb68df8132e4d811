"""The one file that knows Ray Train: it starts the processes, hands each its blocks, and starts them again when they die."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from nev.config import Experiment, Workers
from nev.config_base import ConfigError
from nev.data.block import Block, BlockReader
from nev.data.storage import join
from nev.errors import NevError
from nev.runtime import cluster_cpus, cluster_gpus, may_grow
from nev.tracking import Tracker
from nev.train.job import Job, where
from nev.train.manifest import CheckpointError, patiently
from nev.train.monitor import Post, Watcher, open_board
from nev.train.quarantine import TooManyBadRows

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from nev.data.plan import Plan
    from nev.train.learner import Rank


OUT_OF_MEMORY = (
    "a process of this run was ended because its machine's memory was full. Lower train.micro_batch (`python "
    "pipelines/capacity.py` tells what a worker takes), or let less else run there. The same command goes on from the latest "
    "checkpoint."
)


class Stalled(NevError, RuntimeError):
    """A rank has waited too long for another one."""


class TrainingFailed(NevError, RuntimeError):
    """The run could not be finished. The message is the first cause, without Ray's frames."""


@contextmanager
def posting(run: str) -> Iterator[Any]:
    """The run's board, for the body of a `with`. Raises RunIsBusy where another job of this cluster trains the run."""
    import ray

    board = open_board(run)
    try:
        yield board
    finally:
        ray.kill(board)  # its name is the run's: another start of this run may need it at once


def fit(job: Job, begun: int, reader: BlockReader, board: Any, tracker: Tracker, console: Console) -> dict[str, float]:
    """Run the job on the connected Ray cluster, from its newest checkpoint, that of step `begun`, to `job.stop_step`.

    Workers that had to leave (their machine is taken away) are started again. Returns the newest value of each metric. Raises
    TrainingFailed.
    """
    import ray.train

    watcher = Watcher(board, tracker, console, job.total_steps, begun)
    try:
        with ray_folder(job.run) as folder, watcher.watching():
            while True:
                watcher.left = False
                ray_trainer(job, reader, board, folder).fit()
                watcher.read()
                if watcher.errors or not watcher.left:
                    break
    except ray.train.TrainingFailedError as error:
        raise TrainingFailed(first_cause(error)) from error
    except SystemExit as end:  # how Ray Train's own handler of Ctrl-C ends
        raise KeyboardInterrupt from end
    if watcher.errors:
        raise TrainingFailed(watcher.errors[0])
    return watcher.latest


def ray_trainer(job: Job, reader: BlockReader, board: Any, folder: str) -> TorchTrainer:
    """Ray's trainer of a job: it starts the workers, as many as there is room for between the least and the most."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from nev.data.stream import Turns

    workers = job.config.workers
    scaling: Any = ray.train.ScalingConfig  # typed as the one before, which knows no elasticity
    return TorchTrainer(
        work,
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
            failure_config=ray.train.FailureConfig(max_failures=workers.max_failures),
        ),
        datasets={"train": lambda: stream_from_here(job, reader)},
        dataset_config=Turns(),
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


def check_room(workers: Workers) -> None:
    """Raise ConfigError for workers that never start, or whose stream never does: Ray would wait for room without a word.

    Needs a connected Ray. A cluster that may grow is given the benefit of the doubt.
    """
    if may_grow():
        return
    gpus, cpus = cluster_gpus(), cluster_cpus()
    asked = f"workers.{'min' if workers.min else 'count'} = {workers.least}"
    if workers.least * workers.gpus > gpus:
        raise ConfigError(
            f"{asked} times workers.gpus = {workers.gpus:g} are more than this machine's {gpus} GPUs: "
            "lower one of them, or submit the run to a cluster"
        )
    if workers.cpus and workers.least * workers.cpus > cpus - 1:
        raise ConfigError(
            f"{asked} times workers.cpus = {workers.cpus:g} leave none of this machine's {cpus} CPUs "
            "to decode: lower one of them; with workers.cpus = 0, training and decoding share them"
        )


def check_store(job: Job) -> None:
    """Raise ConfigError where the blocks of a step are more than the cluster's object store. Needs a connected Ray."""
    import ray

    store = ray.cluster_resources().get("object_store_memory", 0.0)  # type: ignore[no-untyped-call]
    step = job.config.train.global_batch * row_bytes(job)
    if step > store and not may_grow():
        raise ConfigError(
            f"the pictures of a step take {step / 2**30:.1f} GiB, and Ray's object store has {store / 2**30:.1f} GiB here: lower "
            "train.global_batch or data.image_size, or submit the run to a cluster"
        )


def row_bytes(job: Job) -> int:
    """What a row of a block takes: its picture, and its vector or tokens."""
    text = 4 * job.config.text.max_tokens if job.config.text_online else 2 * job.text_width
    return job.config.data.image_size**2 * 3 + text


def resources(config: Experiment) -> dict[str, float]:
    """What one worker reserves. Ray wants some resource: a worker that shares the CPUs reserves memory alone."""
    workers = config.workers
    wanted = {"CPU": workers.cpus, "GPU": workers.gpus, "memory": float(workers.memory)}
    return {name: amount for name, amount in wanted.items() if amount}


def stream_from_here(job: Job, reader: BlockReader) -> Any:
    """Called by Ray Train at every start of the worker group: the stream from the latest checkpoint's step."""
    from nev.data.stream import make_stream

    return make_stream(reader, job.plan, patiently(lambda: where(job.run)).step, job.stop_step)


def work(setting: dict[str, Any]) -> None:
    """One training process, started by Ray Train."""
    import ray
    import ray.train
    import ray.train.torch
    import torch

    from nev.train.guards import Diverged
    from nev.train.learner import Rank, build, learner_of
    from nev.train.loop import TowerMoved, train
    from nev.train.parallel import all_of, first_of_all
    from nev.train.step import choose_precision
    from nev.train.writer import NotKept

    job: Job = setting["job"]
    context = ray.train.get_context()
    threads = job.config.workers.threads or max(1, (os.cpu_count() or 1) // context.get_local_world_size())
    torch.set_num_threads(threads)
    device = ray.train.torch.get_device()
    precision = choose_precision(job.config.train.precision, device)
    me = Rank(context.get_world_rank(), context.get_world_size(), device, precision)

    def report(step: int, metrics: dict[str, float], notes: Sequence[str] = ()) -> None:
        setting["board"].post.remote(Post(step, metrics, notes=tuple(notes)))

    def give_up(error: str) -> None:
        # All ranks return together: raised, the error would be tried again, to the same end.
        if me.rank == 0:
            ray.get(setting["board"].post.remote(Post(0, {}, error)))

    # Asked for now, the first block is made while this process still imports and builds the model.
    blocks = blocks_of(job, me)
    first = ThreadPoolExecutor(1).submit(next, blocks, None)
    problem = built = None
    try:
        built = build(job)
    except (ConfigError, CheckpointError) as error:
        problem = str(error)  # perhaps of this node alone: the others must not wait for it
    if found := first_of_all(problem, me.world):
        return give_up(found)
    assert built
    if len(seen := all_of(built.state.step if built.state else 0, me.world)) > 1:
        raise RuntimeError(f"the workers see other newest checkpoints, of steps {sorted(seen)}: they start again")
    learner, start = learner_of(built, job, me)
    del built  # it holds the moments of the checkpoint, whole
    if me.rank == 0:
        ray.get(setting["board"].post.remote(Post(start.step, {}, began=True)))
    try:
        done = train(job, me, learner, start, after(first, blocks), report, asked_to_leave)
        if done < job.stop_step and me.rank == 0:
            note = (
                f"step {done}: a machine is taken away; what was done is kept, and the run goes on where there is room"
            )
            ray.get(setting["board"].post.remote(Post(done, {}, notes=(note,), left=True)))
    except (TooManyBadRows, Diverged, TowerMoved) as error:  # every rank meets these at the same step
        give_up(str(error))
    except NotKept as error:  # of rank 0 alone: the others are done
        if error.step < job.stop_step:
            raise
        give_up(str(error))
    except RuntimeError as error:
        if "timed out" not in str(error).lower():
            raise
        raise Stalled(
            f"rank {me.rank} has waited {job.config.workers.timeout_s} s (workers.timeout_s) for another one, which hangs or is "
            f"cut off; all are started again. Torch says: {str(error).splitlines()[0]}"
        ) from error


def asked_to_leave() -> bool:
    """Whether this process was told that a machine of the run will be taken away.

    Ray's public `get_preemption_info` would have all ranks meet in an actor; here they agree by a byte after each step.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def after(first: Future[Block | None], blocks: Iterator[Block]) -> Iterator[Block]:
    """The block that is on its way, then the others."""
    block = first.result()
    if block is not None:
        yield block
    yield from blocks


def blocks_of(job: Job, me: Rank) -> Iterator[Block]:
    """This rank's blocks, as they left the tasks; the blocks of the next steps are fetched while this one computes."""
    import ray
    import ray.train

    store_bytes = ray.cluster_resources().get("object_store_memory", 0.0)  # type: ignore[no-untyped-call]
    ahead = fetch_ahead(job.plan, me.world, job.plan.block_rows * row_bytes(job), store_bytes)
    shard = ray.train.get_dataset_shard("train")
    return iter(shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=ahead))


def fetch_ahead(plan: Plan, world: int, block_bytes: int, store_bytes: float) -> int:
    """How many blocks a rank holds fetched: two steps' or, where the ranks' would be more, a quarter of the object store.

    The blocks that the tasks are ahead take up to half of it (`nev.data.pacing`); beyond all of it Ray spills to the disk.
    """
    return max(1, min(2 * plan.blocks_per_step // world, int(store_bytes / 4 / world // block_bytes)))


def first_cause(error: BaseException) -> str:
    """The message of a failure that went through Ray: nev's own, else the innermost."""
    failures = getattr(error, "worker_failures", None)
    inner = next(iter(failures.values())) if failures else error
    while not isinstance(inner, NevError) and (deeper := getattr(inner, "cause", None) or inner.__cause__) is not None:
        inner = deeper
    said = str(inner).strip() or repr(inner)
    if (
        not isinstance(inner, NevError) and "out of memory issue" in said
    ):  # Ray's words, of which the first say nothing else
        return OUT_OF_MEMORY
    return f"{type(inner).__name__}: {said if isinstance(inner, NevError) else said.splitlines()[-1]}"
