"""Whether the shipped experiments have room on a cluster's node types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nev.config.file import load, read_config, shipped_configs


def refuse_too_small(types: Mapping[str, Mapping[str, Any]]) -> None:
    """Fail where no node type has room for the workers of a shipped experiment.

    types: `available_node_types` of Ray's autoscaler.
    """
    names = [name for name in shipped_configs() if {"data", "vision"} <= read_config(name).keys()]
    assert "nomic_embed_vision_v1_5" in names
    for name in names:
        workers = load(name).workers
        need = {"GPU": workers.gpus, "CPU": workers.cpus, "memory": workers.memory}
        room = {
            kind: int(min(node["resources"].get(key, 0) // amount for key, amount in need.items() if amount))
            * node["max_workers"]
            for kind, node in types.items()
        }
        assert max(room.values()) >= workers.least, f"{name}: {need} in {room}"
