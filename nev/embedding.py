"""Writing text sidecars on Ray: one actor a GPU, else one a CPU; a shard at a time; shards that have theirs are passed over."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import ray
from rich.console import Console
from rich.progress import track

from nev.config import Columns, Text
from nev.data.index import Index, build_index
from nev.data.sidecar import missing_sidecars, sidecar_key, write_sidecar
from nev.models.text import load_text
from nev.runtime import cluster_cpus, cluster_gpus


class Embedded(NamedTuple):
    """What was done: shards written now, captions in them, seconds from the first shard to the last."""

    shards: int
    captions: int
    seconds: float


class _Embedder:
    def __init__(self, text: Text, indexes: list[Index], fingerprint: str, threads: int) -> None:
        import torch

        torch.set_num_threads(min(threads, os.cpu_count() or 1))
        self._indexes = indexes
        self._tower = load_text(text, "cuda" if ray.get_gpu_ids() else "cpu")
        if self._tower.fingerprint != fingerprint:
            raise RuntimeError("this node's text encoder is not the driver's: install the same one on every node")

    def write(self, root: int, shard: int) -> int:
        index = self._indexes[root]
        assert index.columns.caption
        key = sidecar_key(self._tower.fingerprint, index.columns.caption)
        return write_sidecar(index, shard, key, self._tower.width, self._tower.encode)


def embed_captions(roots: Sequence[str], columns: Columns, text: Text, console: Console) -> Embedded:
    """Write the sidecars that the shards under `roots` lack. Needs a connected Ray. Raises DataError for unusable shards."""
    indexes = [build_index(root, columns) for root in roots]
    tower = load_text(text)
    missing = [
        (root, shard)
        for root, index in enumerate(indexes)
        for shard in missing_sidecars(index, sidecar_key(tower.fingerprint, str(index.columns.caption)))
    ]
    if not missing:
        return Embedded(0, 0, 0.0)
    gpus, cpus = cluster_gpus(), cluster_cpus()
    count = min(gpus or cpus, len(missing))
    actor = ray.remote(_Embedder).options(num_gpus=1 if gpus else 0, num_cpus=1)
    actors = [actor.remote(text, indexes, tower.fingerprint, cpus // count) for _ in range(count)]
    pool = ray.util.ActorPool(actors)
    begin = time.perf_counter()
    results: Any = pool.map_unordered(lambda one, place: one.write.remote(*place), missing)
    shown = track(
        results,
        "embedding captions",
        total=len(missing),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    captions = sum(shown)
    return Embedded(len(missing), captions, time.perf_counter() - begin)
