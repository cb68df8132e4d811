"""Embedding for evaluation, on Ray: tasks decode and embed (the latter on the GPUs where there are any), the driver scores.

Without GPUs one task does both, so that no pixel is copied and no process waits with a core in hand for another; with GPUs
decoding tasks feed them. All sets go through in one run of Ray Data: processes start, and load the tower, once.
"""

from __future__ import annotations

import functools
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
from nev.storage.reading import DataError

if TYPE_CHECKING:
    import torch
    from torch import nn

BLOCKS_AHEAD = 8
# Of a block without pixels: about what a batch makes, so that whoever waits sees how far it is.
VECTOR_BYTES = 256 * 2**10


@dataclass(frozen=True)
class EncoderSpec:
    """A vision tower, as the tasks load it. `load` is called once a process and must travel there (a partial does).

    It returns a module that takes normalised pixels, float [b, 3, S, S], and gives unit vectors, [b, D].
    """

    load: Callable[[], nn.Module]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class EmbedJob(NamedTuple):
    """A set to embed. read: a unit's blocks, each with image: uint8 [b, S, S, 3], and columns that stay with their rows."""

    units: Sequence[Any]
    read: Callable[[Any], Iterable[Block]]


def embed_all(
    works: Sequence[EmbedJob],
    tower: EncoderSpec,
    block_bytes: int,
    done: Callable[[int], None] = lambda rows: None,
    taken: float = 0.0,
) -> Iterator[Block | NevError]:
    """Embed sets on the connected cluster, and yield each in order, as soon as it is whole: its rows, or its error.

    Rows come in the order of the set's units and their blocks. Their columns are those of the blocks, with vector: float32
    [n, D], in the place of image; a set without rows has no columns. block_bytes: of a block, about. done: is told how many
    rows more there are. taken: GPUs of the cluster that others hold; where they hold all, CPUs embed.
    """
    places = [(number, unit) for number, work in enumerate(works) for unit in range(len(work.units))]
    current, parts = 0, list[Block]()
    for found in _embedded(list(works), places, tower, block_bytes, cluster_gpus() > taken):
        while current < int(found["place"][0][0]):  # blocks come in the order of the units
            yield _whole(parts)
            current, parts = current + 1, []
        parts.append(found)
        done(len(found.get("vector", ())))
    for _ in range(current, len(works)):
        yield _whole(parts)
        parts = []


def _embedded(
    works: list[EmbedJob], places: list[tuple[int, int]], tower: EncoderSpec, block_bytes: int, gpus: bool
) -> Iterator[Any]:
    """Blocks as they come, each with place: int64 [b, 3], of the set, the unit and the block in it."""
    with DataContext.current(make_data_context(block_bytes if gpus else VECTOR_BYTES)):
        source, towers = ray.put((works, places)), ray.put(tower)
        if gpus:
            embedded = make_units(read_unit, len(places), source=[source]).map_batches(
                functools.partial(embed_decoded, tower=[towers]),
                batch_size=None,
                num_cpus=0,
                num_gpus=1,
                max_retries=MAX_RETRIES,
                max_calls=0,  # Ray would end a process that has a GPU after each block, and load the tower again
            )
        else:
            embedded = make_units(embed_unit, len(places), source=[source], tower=[towers])
        yield from embedded.iter_batches(batch_size=None, batch_format="numpy")


def make_data_context(block_bytes: int) -> DataContext:
    """Ray Data's settings for evaluation: a block leaves a decoding task when it is whole, and few wait for the next one."""
    context = stream_context(BLOCKS_AHEAD, block_bytes)
    context._max_num_blocks_in_streaming_gen_buffer = BLOCKS_AHEAD
    context.target_max_block_size = block_bytes  # without it all that a unit yields becomes one block (Ray 2.60)
    return context


def make_units(task: Callable[..., Iterator[Block]], count: int, **more: Any) -> ray.data.Dataset:
    """The blocks of a task for each of so many numbers."""
    numbers = ray.data.range(count, override_num_blocks=1).repartition(target_num_rows_per_block=1)
    return numbers.map_batches(functools.partial(task, **more), batch_size=1, num_cpus=1, max_retries=MAX_RETRIES)


def read_unit(numbers: Any, source: list[Any]) -> Iterator[Block]:
    """The Ray Data task that decodes: the number of a unit in, its blocks out; one row, `error`, where it can't be read."""
    works, places = load_from_store(source[0])
    which, unit = places[int(numbers["id"][0])]
    work, number = works[which], 0
    try:
        for block in work.read(work.units[unit]):
            yield {**block, "place": np.full((len(block["image"]), 3), (which, unit, number), np.int64)}
            number += 1
    except NevError as error:  # of one set among many
        yield {"error": np.array([str(error)], object), "place": np.array([[which, unit, number]])}


def embed_decoded(block: Any, tower: list[Any]) -> Block:
    """The Ray Data task that embeds a decoded block."""
    if "error" in block:
        return dict(block)
    vectors = _embedder(tower[0])(block["image"])
    return {**{name: column for name, column in block.items() if name != "image"}, "vector": vectors}


def embed_unit(numbers: Any, source: list[Any], tower: list[Any]) -> Iterator[Block]:
    """The Ray Data task that does both."""
    for block in read_unit(numbers, source):
        yield embed_decoded(block, tower)


@functools.lru_cache(maxsize=1)
def _embedder(reference: ray.ObjectRef[Any]) -> Embed:
    """The tower, loaded once a process: tasks of one kind come back to the same processes."""
    import_uninterrupted("nev.models.vision")
    import torch

    from nev.models.vision import normalise

    tower: EncoderSpec = ray.get(reference)
    torch.set_num_threads(1)
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    vision = tower.load().to(device).eval()
    return make_embedder(vision, lambda images: normalise(images, tower.mean, tower.std), device)


def _whole(parts: list[Block]) -> Block | NevError:
    """Blocks in the order of their places, as one; the first error of those that have one."""
    parts.sort(key=lambda part: tuple(part["place"][0]))
    for part in parts:
        if "error" in part:
            return DataError(str(part["error"][0]))
    return (
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "place"} if parts else {}
    )


Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def make_embedder(
    forward: Callable[[torch.Tensor], torch.Tensor],
    normalise: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> Embed:
    """Wrap a vision tower: uint8 [n, S, S, 3] in, unit float32 [n, D] out, without a graph."""
    import torch

    @torch.inference_mode()
    def embed(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = normalise(torch.tensor(images, device=device))
        vectors: NDArray[np.float32] = forward(pixels).float().cpu().numpy()
        return vectors

    return embed
