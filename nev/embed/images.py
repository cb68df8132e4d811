"""Embedding of whole sets of pictures on Ray.

Without GPUs one task decodes and embeds a block: no pixel is copied between processes, and no process that holds a core waits
for another process. With GPUs, tasks on CPUs decode, and tasks on the GPUs embed. All sets go through one run of Ray Data, so
processes start, and load the tower, once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import DataContext

from nev.cluster.backpressure import MAX_RETRIES, load_from_store, stream_context
from nev.cluster.session import cluster_gpus
from nev.common.errors import NevError
from nev.common.imports import import_uninterrupted
from nev.data.block import Block
from nev.inference.forward import Embed, make_embedder
from nev.storage.reading import DataError

if TYPE_CHECKING:
    from torch import nn

BLOCKS_AHEAD = 8
# Size of a block of vectors: about one batch of pictures, so that progress is reported after each batch.
VECTOR_BYTES = 256 * 2**10


@dataclass(frozen=True)
class EncoderSpec:
    """A vision tower as Ray's tasks load it.

    load: called once in each process; it must be picklable, as a partial is. Returns a module from normalised pixels, float
    [b, 3, S, S], or from the features of a locked trunk, to vectors, [b, D].
    mean, std: of the pixels, by channel, in units of 1.
    """

    load: Callable[[], nn.Module]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class EmbedJob(NamedTuple):
    """A set to embed.

    units: pieces of work; each is read by one task.
    read: a unit to its blocks. A block has image: what the tower takes, uint8 [b, S, S, 3] or features; and further columns of
        b rows.
    """

    units: Sequence[Any]
    read: Callable[[Any], Iterable[Block]]


def embed_all(
    jobs: Sequence[EmbedJob],
    tower: EncoderSpec,
    block_bytes: int,
    on_progress: Callable[[int], None] = lambda rows: None,
    gpus_in_use: float = 0.0,
) -> Iterator[Block | NevError]:
    """Embed sets on the connected cluster. Yields the rows or the error of each set, in the order of `jobs`.

    Rows come in the order of the units and their blocks, with the columns of the blocks; `vector`, as the tower gives it, stands
    in the place of `image`. A set without rows has no columns.
    block_bytes: size of a decoded block, about.
    on_progress: called with the number of rows embedded since the last call.
    gpus_in_use: GPUs of the cluster that others hold. Where others hold all GPUs, CPUs embed.
    """
    current, parts = 0, list[Block]()
    for block in _embedded(jobs, tower, block_bytes, cluster_gpus() > gpus_in_use):
        while current < int(block["place"][0][0]):  # blocks come in the order of the units
            yield _concatenate(parts)
            current, parts = current + 1, []
        parts.append(block)
        on_progress(len(block.get("vector", ())))
    for _ in range(current, len(jobs)):
        yield _concatenate(parts)
        parts = []


def embed_units(
    jobs: Sequence[EmbedJob],
    tower: EncoderSpec,
    block_bytes: int,
    on_progress: Callable[[int], None],
    gpus: int,
) -> Iterator[tuple[int, Block | NevError]]:
    """Embed as `embed_all` does, but yield the rows or the error of each unit with the number of its set, as soon as it is done.

    gpus: GPUs to use; they may have to be started by an autoscaler. 0: CPUs embed.
    """

    def blocks() -> Iterator[Block]:
        for block in _embedded(jobs, tower, block_bytes, gpus > 0, gpus or None):
            on_progress(len(block.get("vector", ())))
            yield block

    for (number, _), parts in itertools.groupby(blocks(), key=lambda block: tuple(block["place"][0][:2].tolist())):
        yield number, _concatenate([*parts])


def _embedded(
    jobs: Sequence[EmbedJob], tower: EncoderSpec, block_bytes: int, gpus: bool, at_once: int | None = None
) -> Iterator[Any]:
    """Blocks as they come, each with place: int64 [b, 3], the numbers of the set, of its unit, and of the block in the unit.

    at_once: most GPUs that embed at a time; None for all.
    """
    places = [(number, unit) for number, job in enumerate(jobs) for unit in range(len(job.units))]
    with DataContext.current(make_data_context(block_bytes if gpus else VECTOR_BYTES)):
        source, towers = ray.put((list(jobs), places)), ray.put(tower)
        if gpus:
            embedded = make_units(read_unit, len(places), source=[source]).map_batches(
                functools.partial(embed_decoded, tower=[towers]),
                batch_size=None,
                num_cpus=0,
                num_gpus=1,
                concurrency=at_once,
                max_retries=MAX_RETRIES,
                max_calls=0,  # Ray would end a process that has a GPU after each block, and load the tower again
            )
        else:
            embedded = make_units(embed_unit, len(places), source=[source], tower=[towers])
        yield from embedded.iter_batches(batch_size=None, batch_format="numpy")


def make_data_context(block_bytes: int) -> DataContext:
    """Ray Data's settings for evaluation: a block leaves its decoding task when it is whole, and few blocks wait in a queue."""
    context = stream_context(BLOCKS_AHEAD, block_bytes)
    context._max_num_blocks_in_streaming_gen_buffer = BLOCKS_AHEAD
    context.target_max_block_size = block_bytes  # without it all that a unit yields becomes one block (Ray 2.60)
    return context


def make_units(task: Callable[..., Iterator[Block]], count: int, **more: Any) -> ray.data.Dataset:
    """A dataset of the blocks that `task` yields for each of the numbers 0 to count - 1. more: further arguments of `task`."""
    numbers = ray.data.range(count, override_num_blocks=1).repartition(target_num_rows_per_block=1)
    return numbers.map_batches(functools.partial(task, **more), batch_size=1, num_cpus=1, max_retries=MAX_RETRIES)


def read_unit(numbers: Any, source: list[Any]) -> Iterator[Block]:
    """The Ray Data task that decodes: yields the blocks of a unit, or one row with `error` where the unit cannot be read."""
    jobs, places = load_from_store(source[0])
    which, unit = places[int(numbers["id"][0])]
    job, number = jobs[which], 0
    try:
        for block in job.read(job.units[unit]):
            yield {**block, "place": np.full((len(block["image"]), 3), (which, unit, number), np.int64)}
            number += 1
    except NevError as error:  # one set must not end the others
        yield {"error": np.array([str(error)], object), "place": np.array([[which, unit, number]])}


def embed_decoded(block: Any, tower: list[Any]) -> Block:
    """The Ray Data task that embeds a decoded block."""
    if "error" in block:
        return dict(block)
    vectors = _embedder(tower[0])(block["image"])
    columns = {name: column for name, column in block.items() if name != "image"}
    if "valid" in columns:
        columns["valid"] = columns["valid"] & are_finite(vectors)
    return {**columns, "vector": vectors}


def embed_unit(numbers: Any, source: list[Any], tower: list[Any]) -> Iterator[Block]:
    """The Ray Data task that decodes and embeds a unit."""
    for block in read_unit(numbers, source):
        yield embed_decoded(block, tower)


@functools.lru_cache(maxsize=1)
def _embedder(reference: ray.ObjectRef[Any]) -> Embed:
    """The tower, loaded once in each process: Ray gives tasks of the same kind to the same processes."""
    import_uninterrupted("nev.models.vision")
    import torch

    tower: EncoderSpec = ray.get(reference)
    torch.set_num_threads(1)
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    return make_embedder(tower.load().to(device).eval(), tower.mean, tower.std, device)


def _concatenate(parts: list[Block]) -> Block | NevError:
    """Blocks in the order of their places, as one block; the first error where a block has an error."""
    parts.sort(key=lambda part: tuple(part["place"][0]))
    for part in parts:
        if "error" in part:
            return DataError(str(part["error"][0]))
    return (
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "place"} if parts else {}
    )


def are_finite(vectors: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether all numbers of a row are finite: bool [n]. A locked trunk's feature beyond float16 makes a vector of NaN."""
    finite: NDArray[np.bool_] = np.isfinite(vectors).reshape(len(vectors), -1).all(axis=1)
    return finite
