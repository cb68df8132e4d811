"""Writing text sidecars on Ray: one actor for each GPU, else one for four CPUs. Shards that have a sidecar are skipped."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console

from nev.cluster.session import cluster_cpus, cluster_nodes, may_grow
from nev.common.progress import progress
from nev.config.base import ConfigError
from nev.config.data import DataSet
from nev.config.model import Text
from nev.data.index import Index, build_index
from nev.data.sidecar import sidecars_to_write
from nev.data.text_sidecar import Encode, sidecar_key, text_sidecars, write_sidecar
from nev.embed.gpus import choose_gpus, wait_for_gpu
from nev.models.text import TextTower, load_text

CPUS_AN_ACTOR = 4


class Written(NamedTuple):
    """The work of a call: sidecars written, captions in these, seconds from the first shard to the last."""

    shards: int
    captions: int
    seconds: float


class Place(NamedTuple):
    """A shard. number: of its set, in the list of sets. shard: position in the index of that set."""

    number: int
    shard: int


def embed_captions(sets: Sequence[DataSet], text: Text, console: Console, gpus: int | None = None) -> Written:
    """Write the sidecars that are missing for the shards of the sets, or no longer fit them. Needs a connected Ray.

    gpus: number of GPUs to use; an autoscaler may have to start them. None: the GPUs that are up now.
    On one machine without a GPU this process embeds: each actor would load a text tower of its own.
    Raises DataError for shards that cannot be used, ConfigError for more GPUs than a Ray that cannot grow has.
    """
    wanted = choose_gpus(gpus)
    indexes = [build_index(*data_set) for data_set in sets]
    tower = load_text(text)
    missing = [
        Place(number, shard)
        for number, index in enumerate(indexes)
        for shard in sidecars_to_write(text_sidecars(index, _key(index, tower), tower.width))
    ]
    if not missing:
        return Written(0, 0, 0.0)
    begin = time.perf_counter()
    if not wanted and may_grow():
        console.print("no GPU is up: embedding on CPUs (--gpus N asks the cluster for some)", highlight=False)
    wait_for_gpu(min(wanted, len(missing)), console)
    captions = done = 0
    with progress(console) as update:

        def show(more: int) -> None:
            rate = (captions + more) / (time.perf_counter() - begin)
            update("shards embedded", done, len(missing), f"{captions + more:,} captions, {rate:,.0f} captions/s")

        counts: Iterator[int]
        if not wanted and cluster_nodes() == 1:
            encode = functools.partial(tower.encode, on_progress=show)
            counts = (_write(indexes, place, tower, encode) for place in missing)
        else:
            counts = _by_actors(text, indexes, tower, missing, wanted)
        show(0)
        for count in counts:
            captions += count
            done += 1
            show(0)
    return Written(len(missing), captions, time.perf_counter() - begin)


def _by_actors(text: Text, indexes: list[Index], tower: TextTower, missing: list[Place], gpus: int) -> Iterator[int]:
    from nev.cluster.tasks import ray_run_on_actors

    cpus = cluster_cpus()
    threads = 1 if gpus else min(CPUS_AN_ACTOR, cpus)  # Ray gives torch as many threads as an actor has CPUs
    count = min(gpus or cpus // threads, len(missing))
    write = functools.partial(_write_there, text=text, indexes=indexes, fingerprint=tower.fingerprint)
    return ray_run_on_actors(write, missing, count, threads, 1 if gpus else 0)


def _write_there(place: Place, text: Text, indexes: list[Index], fingerprint: str) -> int:
    tower = _load_tower(text, fingerprint)
    return _write(indexes, place, tower, tower.encode)


@functools.lru_cache(maxsize=1)
def _load_tower(text: Text, fingerprint: str) -> TextTower:
    """The text tower of an actor's process, on its GPU if there is one. Raises ConfigError for another fingerprint."""
    import torch

    tower = load_text(text, "cuda" if torch.cuda.is_available() else "cpu")
    if tower.fingerprint != fingerprint:
        raise ConfigError(
            f"text.encoder {text.encoder!r}: this node has another encoder than the driver. Install the same encoder everywhere."
        )
    return tower


def _write(indexes: list[Index], place: Place, tower: TextTower, encode: Encode) -> int:
    index = indexes[place.number]
    return write_sidecar(index, place.shard, _key(index, tower), tower.width, encode)


def _key(index: Index, tower: TextTower) -> str:
    return sidecar_key(tower.fingerprint, str(index.columns.caption))
