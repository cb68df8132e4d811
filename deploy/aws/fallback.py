"""On the head: where the cloud refuses machines of a node type, Ray asks for another type meanwhile. Started by `agent.sh`.

Ray's autoscaler v2 (2.60) asks for the same type again, for ever: it lowers the rank of a type whose machine does not get ready,
but not of a type whose machine the cloud refuses. It reads its configuration anew each time, though, and turns to the next type
where a type is at its limit. So here the limit is set to the nodes that the type has, and given back after ten minutes.
A request that is with the cloud at that moment makes the autoscaler log an error, and wait, until the cloud has answered.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import yaml

PAUSE_S = 600
CONFIG = Path.home() / "ray_bootstrap_config.yaml"


def read_state(address: str) -> Any:
    """What the autoscaler says of the cluster."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    reply.ParseFromString(GcsClient(address=address).get_cluster_status(timeout_s=10))
    return reply


def count_nodes(reply: Any) -> Counter[str]:
    """Nodes of each type that run or boot."""
    from ray.core.generated.autoscaler_pb2 import NodeStatus

    nodes = Counter(
        node.ray_node_type_name for node in reply.cluster_resource_state.node_states if node.status != NodeStatus.DEAD
    )
    nodes.update(node.ray_node_type_name for node in reply.autoscaling_state.pending_instances)
    return nodes


def refused_at(reply: Any, name: str) -> float:
    """When the cloud last refused a machine of the type `name`, in seconds since the epoch; 0 where it did not."""
    failed = reply.autoscaling_state.failed_instance_requests
    return max((float(request.failed_ts) for request in failed if request.ray_node_type_name == name), default=0.0)


class Limits(NamedTuple):
    """The limits of a node type.

    own: what the cluster's file says. written: what stands in the autoscaler's configuration by this program.
    """

    own: int
    written: int | None = None


def renew_limit(config: Path, name: str, limits: Limits | None, reply: Any, now: float) -> Limits:
    """Set the limit of a type in the autoscaler's configuration: its nodes, for ten minutes after a refusal, else its own limit.

    limits: those of the call before; another limit in the configuration is one that `ray up` has brought since.
    """
    settings = yaml.safe_load(config.read_text())
    kind = settings["available_node_types"][name]
    current = kind["max_workers"]
    own = limits.own if limits and current == limits.written else current
    limit = min(own, count_nodes(reply)[name]) if now - refused_at(reply, name) < PAUSE_S else own
    if limit != current:
        print(f"{name}: at most {limit} nodes")
        kind["max_workers"] = limit
        # In one step: the autoscaler may read at any time.
        fresh = config.with_suffix(".new")
        fresh.touch(mode=0o600)
        fresh.write_text(yaml.safe_dump(settings))
        fresh.replace(config)
    return Limits(own, limit)


def main() -> None:
    """Look every five seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="name", required=True, help="node type that may be refused")
    parser.add_argument("--config", type=Path, default=CONFIG, help="the autoscaler's configuration")
    parser.add_argument("--address", default="127.0.0.1:6379", help="of the head's GCS")
    arguments = parser.parse_args()
    limits = None
    while True:
        try:
            limits = renew_limit(arguments.config, arguments.name, limits, read_state(arguments.address), time.time())
        except Exception as error:  # noqa: BLE001 - Ray raises several kinds while its head starts; the next look decides
            print(f"the autoscaler: {error}")
        time.sleep(5)


if __name__ == "__main__":
    main()
