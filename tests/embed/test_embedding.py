"""Embedding captions on a cluster: actors write what one process writes, also where their GPU comes later or one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from helpers.pictures import rows_of, write_shard
from rich.console import Console

from nev.config.base import ConfigError
from nev.config.data import Columns, DataSet
from nev.config.model import Text
from nev.data.index import build_index
from nev.embed.captions import embed_captions

COLUMNS, TEXT = Columns(), Text()
QUIET = Console(quiet=True)


def shards(folder: Path, count: int) -> str:
    for number in range(count):
        write_shard(folder / f"{number}.parquet", rows_of(6, first=6 * number, width=8, height=8), [4, 2])
    return str(folder)


def sidecars(root: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(root, "_text").rglob("*.parquet")}


@pytest.mark.ray
def test_gpus_that_one_machine_lacks_are_an_error(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"this machine has 0 GPUs, not 2: leave --gpus out"):
        embed_captions([DataSet(shards(tmp_path, 1), COLUMNS)], TEXT, QUIET, gpus=2)


# A cluster of a head without CPUs. Its node with a GPU (a made-up one: the tower runs on the CPU) is added when the actor
# waits for it, as an autoscaler would.
GROWING = """
import os, sys, threading
import ray
from ray.cluster_utils import Cluster
from rich.console import Console
from nev.config.model import Text
from nev.config.data import Columns, DataSet
from nev.embed.captions import embed_captions
from nev.cluster.session import connect

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
os.environ["RAY_ADDRESS"] = cluster.address
connect()
done = []
sets = [DataSet(root, Columns()) for root in sys.argv[1:]]
work = lambda: done.append(embed_captions(sets, Text(), Console(width=200), gpus=1))
asking = threading.Thread(target=work)
asking.start()
asking.join(8)
assert asking.is_alive() and not done, "it does not wait for its GPU"
cluster.add_node(num_cpus=1, num_gpus=1)
asking.join(150)
print(done[0].shards, done[0].captions)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_actor_waits_for_its_gpu_and_writes_what_one_process_writes(ray_cluster: None, tmp_path: Path) -> None:
    here, there = shards(tmp_path / "here", 3), shards(tmp_path / "there", 3)
    alone = embed_captions([DataSet(here, COLUMNS)], TEXT, QUIET)
    assert (alone.shards, alone.captions) == (3, len(sidecars(here)) * 6)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", GROWING, there]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("waiting since ")
    assert first.endswith(" for room: 1 x (1 GPU)")
    assert last == "3 18"
    assert sidecars(here) == sidecars(there)
    assert build_index(there, COLUMNS).total_rows == 18


def deadly_once(marker: Path, number: int) -> int:
    if number == 2 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.ray
@pytest.mark.slow
def test_an_item_whose_actor_dies_is_done_by_another(ray_cluster: None, tmp_path: Path) -> None:
    from ray import cloudpickle

    from nev.cluster.tasks import ray_run_on_actors

    marker = tmp_path / "died"
    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)  # Ray's processes could not import it
    try:
        found = sorted(ray_run_on_actors(partial(deadly_once, marker), range(6), count=2, cpus=0.5, gpus=0))
    finally:
        cloudpickle.unregister_pickle_by_value(here)
    assert found == [0, 1, 2, 3, 4, 5]
    assert marker.exists()
