"""Scoring a checkpoint on Ray: stateless tasks decode, others embed (on the GPUs where there are any), the driver scores."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import DataContext

from nev.data.block import Block
from nev.data.plan import in_order
from nev.data.stream import DEATHS, fetched, stream_context
from nev.eval.scoring import Embedded
from nev.eval.validation import Embed, Validation, collect, embed_block, embedder
from nev.runtime import cluster_gpus

if TYPE_CHECKING:
    from torch import nn

BLOCKS_AHEAD = 8


@dataclass(frozen=True)
class Tower:
    """A vision tower, as the tasks load it. `load` is called once a process and must travel there (a partial does).

    It returns a module that takes normalised pixels, float [b, 3, S, S], and gives unit vectors, [b, D].
    """

    load: Callable[[], nn.Module]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def embed_set(task: Validation, tower: Tower) -> Embedded:
    """Embed a whole validation set on the connected cluster, in index order."""
    blocks = in_order(task.reader.index.rows, task.batch)
    gpus = cluster_gpus()
    with DataContext.current(stream_context(BLOCKS_AHEAD, task.batch * task.reader.row_bytes)):
        reader = ray.put((task.reader, blocks))
        numbers = ray.data.range(len(blocks), override_num_blocks=1)
        decoded = numbers.repartition(target_num_rows_per_block=1).map_batches(
            functools.partial(read_numbered, source=[reader]), batch_size=1, max_retries=DEATHS
        )
        embedded = decoded.map_batches(
            functools.partial(embed_numbered, source=[ray.put(tower)]),
            batch_size=None,
            num_cpus=0 if gpus else 1,
            num_gpus=1 if gpus else 0,
            max_retries=DEATHS,
            max_calls=0,  # Ray would end a process that has a GPU after each block, and load the tower again
        )
        parts: list[Any] = list(embedded.iter_batches(batch_size=None, batch_format="numpy"))
    parts.sort(key=lambda part: int(part["number"][0]))
    return collect([Embedded(part["images"], part["valid"], part["labels"]) for part in parts])


def read_numbered(numbers: Any, source: list[Any]) -> Block:
    """The Ray Data task of evaluation: one block number in, its decoded rows out."""
    reader, blocks = fetched(source[0])
    number = int(numbers["id"][0])
    block: Block = reader.read(blocks[number], 0)
    kept = {name: block[name] for name in ("image", "valid", "label")}
    return {**kept, "number": np.full(len(block["valid"]), number)}


def embed_numbered(block: Any, source: list[Any]) -> Block:
    """The Ray Data task that embeds a decoded block."""
    embedded = embed_block(block, _embedder(source[0]))
    return {**embedded._asdict(), "number": block["number"]}


@functools.lru_cache(maxsize=1)
def _embedder(reference: ray.ObjectRef[Any]) -> Embed:
    """The tower, loaded once a process: tasks of one kind come back to the same processes."""
    import torch

    from nev.models.vision import normalise

    tower: Tower = ray.get(reference)
    torch.set_num_threads(1)
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    vision = tower.load().to(device).eval()
    return embedder(vision, lambda images: normalise(images, tower.mean, tower.std), device)


def pictures(task: Validation, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
    """The evaluation views of some rows (positions in index order): uint8 [S, S, 3] each."""
    from nev.data.plan import Segment

    ends = np.cumsum(task.reader.index.rows)
    views = []
    for row in rows.tolist():
        group = int(np.searchsorted(ends, row, side="right"))
        start = int(row - (ends[group] - task.reader.index.rows[group]))
        views.append(task.reader.read([Segment(group, start, start + 1)], 0)["image"][0])
    return views
