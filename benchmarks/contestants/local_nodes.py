"""A cloud for Ray's autoscaler on this machine: a head without CPUs, and nodes that are `ray start` processes.

Ray loads `LocalNodes` by its name. A node type's `node_config` may have `boot_s`, the time before a node joins, and `fails`
(true: the cloud has none). `provider.folder` has a file for each node, `ID.json`: its type and its process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

from benchmarks.contestants.head import BIN, environment_without_ray, free_ports, head_folder, running_head
from benchmarks.contestants.processes import REPOSITORY

HEAD = {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0}
DECODER = {
    "resources": {"CPU": 1, "memory": 2**30},
    "labels": {"nev.io/role": "decoder"},
    "node_config": {"boot_s": 2},
    "min_workers": 0,
    "max_workers": 5,
}
PLACE = [
    "--node-ip-address=127.0.0.1",
    "--min-worker-port=0",
    "--max-worker-port=0",
    "--dashboard-agent-listen-port=0",
    "--disable-usage-stats",
]


class LocalNodes(NodeProvider):
    """Starts and ends the nodes. One object, in the process of Ray's autoscaler."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._folder = Path(provider_config["folder"])
        self._tags = {"head": {TAG_RAY_NODE_KIND: "head", TAG_RAY_USER_NODE_TYPE: "head"}}
        self._nodes: dict[str, subprocess.Popen[bytes] | None] = {"head": None}
        self._lock = threading.Lock()

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        """The ids of the nodes that are there and have these tags."""
        with self._lock:
            alive = [node for node, process in self._nodes.items() if process is None or process.poll() is None]
        return [node for node in alive if tag_filters.items() <= self._tags[node].items()]

    def is_running(self, node_id: str) -> bool:
        """Whether a node is there."""
        return node_id in self.non_terminated_nodes({})

    def is_terminated(self, node_id: str) -> bool:
        """Whether a node is gone."""
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        """The tags of a node, its type among them."""
        return self._tags[node_id]

    def external_ip(self, node_id: str) -> str:
        """The name by which Ray tells nodes apart."""
        return node_id

    internal_ip = external_ip

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        """Start nodes as a cloud does: they are there at once, and join when they have booted."""
        if node_config.get("fails"):
            raise RuntimeError("InsufficientInstanceCapacity: the cloud has none of these")
        for _ in range(count):
            with self._lock:
                node = f"{tags[TAG_RAY_USER_NODE_TYPE]}-{len(self._nodes)}"
                self._tags[node] = dict(tags)
                self._nodes[node] = self._start(node, node_config, resources, labels)

    def _start(self, node: str, config: dict[str, Any], resources: dict[str, float], labels: dict[str, str]) -> Any:
        amounts = dict(resources)
        options = [f"--num-cpus={amounts.pop('CPU', 0):g}", f"--num-gpus={amounts.pop('GPU', 0):g}"]
        options += [f"--memory={amounts.pop('memory', 2**30):.0f}", f"--resources={json.dumps(amounts)}"]
        options += [
            f"--object-store-memory={config.get('object_store_memory', 200 * 2**20)}",
            f"--labels={_write_labels(labels)}",
        ]
        start = [str(BIN / "ray"), "start", f"--address={self.provider_config['address']}", "--block", *PLACE, *options]
        command = ["bash", "-c", f'sleep {config.get("boot_s", 0)}; exec "$@"', "boot", *start]
        env = {
            **os.environ,
            "RAY_CLOUD_INSTANCE_ID": node,
            "RAY_NODE_TYPE_NAME": self._tags[node][TAG_RAY_USER_NODE_TYPE],
        }
        with (self._folder / f"{node}.txt").open("wb") as output:
            process = subprocess.Popen(
                command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        facts = {"pid": process.pid, "type": env["RAY_NODE_TYPE_NAME"]}
        written = self._folder / f"{node}.part"
        written.write_text(json.dumps(facts))
        written.rename(self._folder / f"{node}.json")
        return process

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        """Add tags to a node."""
        self._tags[node_id].update(tags)

    def terminate_node(self, node_id: str) -> None:
        """Shut a node down."""
        process = self._nodes[node_id]
        if process:
            end_node(process.pid, signal.SIGTERM)


def end_node(pid: int, how: signal.Signals = signal.SIGKILL) -> None:
    """End a node and its processes: SIGKILL is a machine that is gone, SIGTERM one that is shut down."""
    try:
        os.killpg(pid, how)
    except ProcessLookupError:
        return


def is_running(pid: int) -> bool:
    """Whether a process is there that has not ended. One that has ended stays in the table until its parent asks for it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _write_labels(labels: dict[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in labels.items())


@dataclass(frozen=True)
class Cloud:
    """A head whose autoscaler (v2) starts and ends nodes.

    address: of the head. folder: of the nodes' files. env: of a driver.
    """

    address: str
    folder: Path
    env: dict[str, str]

    def launched(self) -> list[str]:
        """The types of all nodes so far, in the order of their start."""
        return [json.loads(file.read_text())["type"] for file in self._files()]

    def alive(self) -> dict[int, str]:
        """The nodes that are there: the pid and the type of each, in the order of their start."""
        nodes = [json.loads(file.read_text()) for file in self._files()]
        return {node["pid"]: node["type"] for node in nodes if is_running(node["pid"])}

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.json"), key=lambda file: int(file.stem.rpartition("-")[2]))


@contextmanager
def autoscaling_cloud(types: dict[str, dict[str, Any]], idle_s: float = 10) -> Iterator[Cloud]:
    """A cloud for the body of a `with`.

    types: `available_node_types` beside the head. idle_s: time after which an idle node goes.
    """
    with head_folder() as folder:
        nodes, config = folder / "nodes", folder / "cluster.yaml"
        nodes.mkdir()
        (port,) = free_ports(1)
        address = f"127.0.0.1:{port}"
        config.write_text(yaml.safe_dump(cluster_config(types, idle_s, nodes, address)))
        env = environment_without_ray() | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        env |= {"RAY_AUTH_MODE": "disabled", "NEV_DECODERS": "1"}
        autoscaler = {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": "head", "RAY_NODE_TYPE_NAME": "head"}
        options = ["--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=0", f"--autoscaling-config={config}"]
        options += [f"--object-store-memory={200 * 2**20}", "--include-dashboard=false"]
        try:
            with running_head(folder, env | autoscaler, options):
                yield Cloud(address, nodes, env | {"RAY_ADDRESS": address})
        finally:
            for file in nodes.glob("*.json"):
                end_node(json.loads(file.read_text())["pid"])


def cluster_config(types: dict[str, dict[str, Any]], idle_s: float, nodes: Path, address: str) -> dict[str, Any]:
    """What `ray start --autoscaling-config` reads. nodes: folder of the nodes' files. address: of the head."""
    provider = {"type": "external", "module": f"{__name__}.LocalNodes", "folder": str(nodes), "address": address}
    never = {"disable_node_updaters": True, "disable_launch_config_check": True}
    unused = ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands")
    unused += ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")
    return {
        "cluster_name": "cloud",
        "provider": provider | never,
        "head_node_type": "head",
        "available_node_types": {"head": HEAD, **types},
        "max_workers": 8,
        "idle_timeout_minutes": idle_s / 60,
        "upscaling_speed": 100,
        "auth": {},
        "file_mounts": {},
        **{name: [] for name in unused},
    }
