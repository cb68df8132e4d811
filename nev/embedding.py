"""Writing text sidecars on Ray: an actor a GPU, else one for four CPUs. Shards that have theirs are passed over."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import ray
from rich.console import Console
from rich.progress import track

from nev.config import Columns, Text
from nev.data.index import Index, build_index
from nev.data.sidecar import missing_sidecars, sidecar_key, write_sidecar
from nev.models.text import TextTower, load_text
from nev.runtime import cluster_cpus, cluster_gpus, cluster_nodes

CPUS_AN_ACTOR = 4


class Written(NamedTuple):
    """What was done: shards written now, captions in them, seconds from the first shard to the last."""

    shards: int
    captions: int
    seconds: float


class Place(NamedTuple):
    """A shard: its root's position in the list of roots, and its own in that root's index."""

    root: int
    shard: int


class _Embedder:
    def __init__(self, text: Text, indexes: list[Index], fingerprint: str) -> None:
        self._indexes = indexes
        self._tower = load_text(text, "cuda" if ray.get_gpu_ids() else "cpu")
        if self._tower.fingerprint != fingerprint:
            raise RuntimeError("this node's text encoder is not the driver's: install the same one on every node")

    def write(self, place: Place) -> int:
        return _write(self._indexes, place, self._tower)


def embed_captions(roots: Sequence[str], columns: Columns, text: Text, console: Console) -> Written:
    """Write the sidecars that the shards under `roots` lack. Needs a connected Ray. Raises DataError for unusable shards.

    On one machine without a GPU the tower of this process does it: actors would each load another.
    """
    indexes = [build_index(root, columns) for root in roots]
    tower = load_text(text)
    missing = [
        Place(root, shard)
        for root, index in enumerate(indexes)
        for shard in missing_sidecars(index, sidecar_key(tower.fingerprint, str(index.columns.caption)))
    ]
    if not missing:
        return Written(0, 0, 0.0)
    begin = time.perf_counter()
    alone = cluster_nodes() == 1 and not cluster_gpus()
    counts = (
        (_write(indexes, place, tower) for place in missing) if alone else _by_actors(text, indexes, tower, missing)
    )
    shown = track(
        counts,
        "embedding captions",
        total=len(missing),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    captions = sum(shown)
    return Written(len(missing), captions, time.perf_counter() - begin)


def _by_actors(text: Text, indexes: list[Index], tower: TextTower, missing: list[Place]) -> Iterator[int]:
    gpus, cpus = cluster_gpus(), cluster_cpus()
    threads = 1 if gpus else min(CPUS_AN_ACTOR, cpus)  # Ray gives torch as many threads as an actor has CPUs
    actor = ray.remote(_Embedder).options(
        num_gpus=1 if gpus else 0, num_cpus=threads, max_restarts=-1, max_task_retries=-1
    )
    count = min(gpus or cpus // threads, len(missing))
    pool = ray.util.ActorPool([actor.remote(text, indexes, tower.fingerprint) for _ in range(count)])
    counts: Iterator[int] = pool.map_unordered(lambda one, place: one.write.remote(place), missing)
    return counts


def _write(indexes: list[Index], place: Place, tower: TextTower) -> int:
    index = indexes[place.root]
    assert index.columns.caption
    key = sidecar_key(tower.fingerprint, index.columns.caption)
    return write_sidecar(index, place.shard, key, tower.width, tower.encode)
