"""A corpus of pictures as vector files, on Ray: a task a part of the input, on a CPU, or on a share of a GPU. Or in this process.

A task reads, decodes, embeds and writes its part (`nev.embed.part`): neither pixels nor vectors pass through another process, so
the driver takes no part in a hundred million pictures but the counts. Parts whose file is there are skipped.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ray.exceptions import RayError
from rich.console import Console

from nev.cluster.ray_internals import first_cause
from nev.cluster.session import cluster_cpus, connect, may_grow
from nev.common.cores import count_cores
from nev.common.imports import import_uninterrupted
from nev.common.progress import progress
from nev.config.base import ConfigError
from nev.data.prepare.job_state import exclusive_lock
from nev.data.sources import Part, Source, take_first
from nev.data.vectors import Precision, VectorSpec
from nev.embed.features import EmbeddingFailed
from nev.embed.gpus import choose_gpus, wait_for_gpu
from nev.embed.output import (
    PartSpec,
    count_reasons,
    count_repeated_uids,
    find_finished,
    prune_stale,
    remove_unfinished,
)
from nev.embed.part import PROGRESS_S, PartJob, embed_part
from nev.embed.same_model import ModelPlace
from nev.runs.folder import check_writable

if TYPE_CHECKING:
    from nev.inference.model import Model

PROCESSES_A_GPU = 2  # while one reads and writes, the other embeds
PART_BYTES = 16 * 2**20  # of small files that make a part; a larger file is a part of its own
TASK_BYTES = 1280 * 2**20  # memory of a task beside the weights: libraries, a batch, a row group
FEW_BYTES = 64 * 2**20  # of pictures that this process has embedded before Ray's processes stand
FAILED_PARTS = 16  # so many parts that cannot be read end the command, where fewer parts could be


class CorpusOptions(NamedTuple):
    """How a corpus is embedded.

    output: folder or s3:// prefix of the vector files, absolute.
    inputs: as the user has given them, for the record.
    width: numbers of a vector. None: the model's.
    precision: how the numbers are stored.
    captions: keep the captions, and the largest cosine of each picture with its captions.
    thumbnail: longest side of a thumbnail, in pixels; 0: none.
    batch_size: pictures of a forward. None: `nev.embed.part.choose_batch`.
    limit: embed only the first rows of the input. None: all.
    prune: delete the files of parts whose input has changed or is gone.
    """

    output: str
    inputs: list[str]
    width: int | None = None
    precision: Precision = "float32"
    captions: bool = True
    thumbnail: int = 0
    batch_size: int | None = None
    limit: int | None = None
    prune: bool = False


class Unreadable(NamedTuple):
    """A part that cannot be read.

    reason: what the source's reader says.
    """

    reason: str


# Numbers of pictures as they are embedded, then what was written.
PartResult = int | PartSpec | Unreadable
Run = Callable[[PartJob, list[Part]], Iterator[PartResult]]


class WriteResult(NamedTuple):
    """What was done with the parts that were missing.

    parts: that are written.
    unreadable: why parts cannot be read.
    seconds: from the first part to the last, with the start of the processes.
    """

    parts: list[PartSpec]
    unreadable: list[str]
    seconds: float


class CorpusReport(NamedTuple):
    """The result of a call.

    written: parts that this call has written.
    skipped: parts that were there.
    pruned: files of other input that were deleted.
    pictures: vectors in the parts that this call has written.
    total: vectors in the folder.
    bad: pictures in the folder that cannot be used, by reason.
    unreadable: why parts could not be read.
    repeated: vectors whose uid another vector has.
    seconds: from the first part to the last.
    """

    written: int
    skipped: int
    pruned: int
    pictures: int
    total: int
    bad: Counter[str]
    unreadable: list[str]
    repeated: int
    seconds: float


def embed_corpus(
    model: Model, place: ModelPlace, source: Source, options: CorpusOptions, console: Console, run: Run
) -> CorpusReport:
    """Write the vector files that are missing.

    model: opened in this process. place: where the tasks open it.
    run: embeds parts: that of `choose_run`.
    Raises ConfigError for an output of another model or other options; EmbeddingFailed where a process cannot work, and where
    most parts cannot be read.
    """
    if options.limit is not None:
        source = take_first(source, options.limit)
    job = make_job(model, place, source, options)
    with exclusive_lock(options.output, "embed-images"):
        finished = find_finished(options.output, job.spec, job.settings)
        stamps = {part.stamp for part in source.parts}
        pruned = prune_stale(options.output, finished.keys() - stamps, options.prune)
        remove_unfinished(options.output)
        missing = [part for part in source.parts if part.stamp not in finished]
        there = [part for stamp, part in finished.items() if stamp in stamps]
        result = WriteResult([], [], 0.0)
        if missing:
            check_writable(options.output, f"--output {options.output}")
            result = write_parts(missing, len(there), functools.partial(run, job), console)
        remove_unfinished(options.output)
        repeated = count_repeated_uids(options.output) if result.parts else 0
    parts = [*there, *result.parts]
    return CorpusReport(
        written=len(result.parts),
        skipped=len(there),
        pruned=pruned,
        pictures=sum(part.rows for part in result.parts),
        total=sum(part.rows for part in parts),
        bad=Counter(count_reasons(*(part.bad for part in parts))),
        unreadable=result.unreadable,
        repeated=repeated,
        seconds=result.seconds,
    )


def make_job(model: Model, place: ModelPlace, source: Source, options: CorpusOptions) -> PartJob:
    """What is done with each part. Raises ConfigError for a width that the model does not have."""
    width = model.width if options.width is None else options.width
    if width > model.width:
        raise ConfigError(f"--width {width}: the model's vectors have {model.width} numbers")
    spec = VectorSpec(
        model=model.spec.name,
        fingerprint=model.fingerprint,
        text_fingerprint=model.text_fingerprint,
        width=width,
        precision=options.precision,
        # The means are of whole vectors: each narrower vector has another length before it is scaled.
        calibration=model.spec.calibration if width == model.width else None,
    )
    settings: dict[str, Any] = {
        **(source.spec or {}),
        "inputs": options.inputs,
        "limit": options.limit,
        "captions": options.captions,
        "thumbnail": options.thumbnail,
    }
    settings = json.loads(json.dumps(settings))  # as the metadata give them back
    return PartJob(
        options.output, source.read, place, spec, settings, options.captions, options.thumbnail, options.batch_size
    )


def write_parts(
    missing: list[Part], there: int, run: Callable[[list[Part]], Iterator[PartResult]], console: Console
) -> WriteResult:
    """Write the vector files of the parts.

    there: parts of the input that are there already. run: embeds parts.
    Raises EmbeddingFailed where a process cannot work, and where most parts cannot be read.
    """
    written, failed, pictures = list[PartSpec](), list[str](), 0
    begin = first = time.perf_counter()
    with progress(console) as update:

        def show() -> None:
            seconds = time.perf_counter() - first
            rate = f"{pictures:,} pictures, {pictures / seconds:,.0f} pictures/s" if pictures else "starting"
            update("parts embedded", there + len(written), there + len(missing), rate)

        show()
        for result in run(missing):
            if isinstance(result, PartSpec):
                written.append(result)
            elif isinstance(result, Unreadable):
                failed.append(result.reason)
                console.print(f"not embedded: {result.reason}", highlight=False, markup=False, soft_wrap=True)
                if len(failed) >= FAILED_PARTS > len(written):
                    raise EmbeddingFailed(
                        f"{len(failed)} parts cannot be read, and {len(written)} can. The first: {failed[0]}"
                    )
            elif result:
                if not pictures:  # the pace is that without the start of the processes
                    first = time.perf_counter() - PROGRESS_S
                pictures += result
            show()
    return WriteResult(written, failed, time.perf_counter() - begin)


def choose_run(source: Source, gpus: int | None, weights: int, console: Console) -> Run:
    """How parts are embedded: few pictures in this process, unless Ray runs, a cluster is named, or GPUs are; others on Ray.

    gpus, weights: as in `run_on_ray`.
    """
    import ray

    if source.nbytes <= FEW_BYTES and gpus is None and not may_grow() and not ray.is_initialized():
        return run_here
    connect()
    return functools.partial(run_on_ray, gpus=gpus, weights=weights, console=console)


def run_here(job: PartJob, parts: list[Part]) -> Iterator[PartResult]:
    """Embed the parts in this process, one after another, on its GPU or on all of its CPUs."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = count_cores()
    for part in parts:
        yield from embed_or_report(part, job, device, threads)


def run_on_ray(
    job: PartJob, parts: list[Part], gpus: int | None, weights: int, console: Console
) -> Iterator[PartResult]:
    """Embed the parts on the connected cluster, and yield what the tasks yield.

    A part has a task of one CPU. Where there are fewer parts than CPUs, a task has several.
    gpus: GPUs to use; an autoscaler may have to start them. None: the GPUs that are up; without any, CPUs.
    weights: of the model, in bytes.
    Raises ConfigError for more GPUs than a Ray that cannot grow has.
    """
    from nev.cluster.tasks import ray_run_streaming

    gpus = choose_gpus(gpus)
    console.print(f"embedding on {f'{gpus} GPUs' if gpus else f'{cluster_cpus()} CPUs'}", highlight=False)
    if gpus:
        wait_for_gpu(min(gpus, math.ceil(len(parts) / PROCESSES_A_GPU)), console)
        cpus, share, at_once = 0.0, 1 / PROCESSES_A_GPU, PROCESSES_A_GPU * gpus
    else:
        threads = max(1, min(cluster_cpus() // len(parts), most_cpus()))
        cpus, share, at_once = float(threads), 0.0, None
    task = functools.partial(embed_on_cluster, job=job, threads=int(cpus))
    try:
        yield from ray_run_streaming(task, parts, TASK_BYTES + weights, cpus, share, at_once)
    except RayError as error:  # a process of the cluster has died, or could not load the model
        cause = getattr(error, "cause", None) or error
        raise EmbeddingFailed(first_cause(cause).splitlines()[0]) from error


def embed_on_cluster(part: Part, job: PartJob, threads: int) -> Iterator[PartResult]:
    """The task. threads: of a task on CPUs; 0: on a GPU, whose tasks share the CPUs of its node."""
    import ray

    import_uninterrupted("nev.inference.load")
    on_gpu = bool(ray.get_gpu_ids())
    yield from embed_or_report(part, job, "cuda" if on_gpu else "cpu", threads or threads_beside_gpu())


def embed_or_report(part: Part, job: PartJob, device: str, threads: int) -> Iterator[PartResult]:
    """Embed a part, or yield why it cannot be read: other parts may be good."""
    try:
        yield from embed_part(part, job, device, threads)
    except ConfigError as error:
        yield Unreadable(str(error))


def threads_beside_gpu() -> int:
    """The CPUs of this node for each process that shares one of its GPUs."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    resources = next(each["Resources"] for each in ray.nodes() if each["NodeID"] == node)  # type: ignore[no-untyped-call]
    return max(1, int(resources.get("CPU", 1) / resources["GPU"] / PROCESSES_A_GPU))


def most_cpus() -> int:
    """CPUs of the largest node."""
    import ray

    return max(1, *(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]))  # type: ignore[no-untyped-call]


def weight_bytes(model: Model, with_text: bool) -> int:
    """Bytes of the weights that a task loads."""
    modules = [model.vision, *([model.text.model] if with_text else [])]
    return sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())
