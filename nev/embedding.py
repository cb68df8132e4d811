"""Writing text sidecars on Ray: one actor a GPU (one on a laptop), one shard a task; shards that have one are passed over."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import ray
from rich.console import Console
from rich.progress import track

from nev.config import Columns, Text
from nev.data.index import Index, build_index
from nev.data.sidecar import missing_sidecars, sidecar_key, write_sidecar
from nev.models.text import load_text
from nev.runtime import cluster_gpus


class Embedded(NamedTuple):
    """What was done: shards written now, captions in them, seconds from the first shard to the last, width of the space."""

    shards: int
    captions: int
    seconds: float
    width: int


class _Embedder:
    def __init__(self, text: Text, index: Index, fingerprint: str) -> None:
        self._index = index
        self._tower = load_text(text, "cuda" if ray.get_gpu_ids() else "cpu")
        if self._tower.fingerprint != fingerprint:
            raise RuntimeError("this node's text encoder is not the driver's: install the same one on every node")

    def write(self, shard: int) -> int:
        assert self._index.columns.caption
        key = sidecar_key(self._tower.fingerprint, self._index.columns.caption)
        return write_sidecar(self._index, shard, key, self._tower.width, self._tower.encode)


def embed_captions(root: str, columns: Columns, text: Text, console: Console) -> Embedded:
    """Write the sidecars that the shards under `root` lack. Needs a connected Ray. Raises DataError for unusable shards."""
    index = build_index(root, columns)
    assert index.columns.caption
    tower = load_text(text)
    missing = missing_sidecars(index, sidecar_key(tower.fingerprint, index.columns.caption))
    if not missing:
        return Embedded(0, 0, 0.0, tower.width)
    gpus = cluster_gpus()
    actor = ray.remote(_Embedder).options(num_gpus=1 if gpus else 0, num_cpus=1)
    actors = [actor.remote(text, index, tower.fingerprint) for _ in range(min(max(1, gpus), len(missing)))]
    pool = ray.util.ActorPool(actors)
    begin = time.perf_counter()
    results: Any = pool.map_unordered(lambda one, shard: one.write.remote(shard), missing)
    shown = track(
        results,
        f"embedding {root}",
        total=len(missing),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    captions = sum(shown)
    return Embedded(len(missing), captions, time.perf_counter() - begin, tower.width)
