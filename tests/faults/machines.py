"""Several Ray nodes on this machine, each a raylet with its own processes and object store, to be killed one by one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

STARTING = "ray::RayTrainWorker.init_train_context"  # a training process that starts, before it meets the others
STORE, MEMORY = 300 * 2**20, 2**30
TRAINER, DECODER = "ray::RayTrainWorker", "ray::MapBatches(read_window)"  # as processes call themselves


class Machines:
    """A head with room to decode, and nodes of `cpus` CPUs. The driver runs beside the head, as a submitted job does."""

    def __init__(self, nodes: int, cpus: int) -> None:
        self._cpus = cpus
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "memory": 2**27, "include_dashboard": False, "object_store_memory": STORE},
        )
        for _ in range(nodes):
            self.add()

    @property
    def address(self) -> str:
        """Where a driver connects to."""
        return str(self.cluster.address)

    def add(self) -> Any:
        """Another node."""
        return self.cluster.add_node(num_cpus=self._cpus, memory=MEMORY, object_store_memory=STORE)

    def nodes(self) -> list[Any]:
        """The nodes beside the head that are there."""
        return sorted(self.cluster.worker_nodes, key=lambda node: node.node_id)

    def processes(self, name: str, node: Any = None) -> list[psutil.Process]:
        """Ray's processes of that name, on one node or on all."""
        of = [node] if node else [self.cluster.head_node, *self.nodes()]
        found = []
        for one in of:
            raylet = psutil.Process(one.all_processes["raylet"][0].process.pid)
            for child in raylet.children():
                try:
                    if "".join(child.cmdline()).startswith(name):
                        found.append(child)
                except psutil.NoSuchProcess:
                    continue
        return found

    def node_with(self, name: str, without: str = "") -> Any:
        """A node that runs such a process, and none of the other name; None where there is none."""
        for node in self.nodes():
            if self.processes(name, node) and not (without and self.processes(without, node)):
                return node
        return None

    def kill(self, node: Any) -> None:
        """SIGKILL to all of a node at once, the raylet first: what a machine does that is gone."""
        self.cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any, seconds: int) -> None:
        """What a cloud's notice comes to in Ray: this node will be taken away in so many seconds."""
        deadline_ms = time.time_ns() // 10**6 + seconds * 1000
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        # As `ray drain-node` does it. Its own start takes so long that a short run is over before the notice comes.
        accepted, why_not = GcsClient(address=self.address).drain_node(
            node.node_id, reason, "a spot machine is taken back", deadline_ms
        )
        assert accepted, why_not


@contextmanager
def machines(nodes: int = 3, cpus: int = 1) -> Iterator[Machines]:
    """A cluster for the body of a `with`."""
    cluster = Machines(nodes, cpus)
    try:
        yield cluster
    finally:
        cluster.cluster.shutdown()


def environment(address: str) -> dict[str, str]:
    """What a driver needs to find the cluster."""
    # Ray looks for notices every 5 s, in which a short run would be over.
    return {
        **os.environ,
        "RAY_ADDRESS": address,
        "HF_HUB_OFFLINE": "1",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
    }
