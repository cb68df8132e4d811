"""cluster.yaml, by Ray's own rules and by ours. Neither AWS nor its SDK is asked."""

from __future__ import annotations

import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import (  # type: ignore[attr-defined]
    ClusterResourceConstraint,
    GangResourceRequest,
)

REPO = Path(__file__).parents[2]
FILE = REPO / "cluster.yaml"
NODE_TYPES = {"head", "gpu_worker", "cpu_decoder"}
# What Ray reads from AWS of the instance types of the file (memory in bytes, less the object store's 30 %).
RESOURCES: dict[str, dict[str, float]] = {
    "head": {"CPU": 0},
    "gpu_worker": {"CPU": 16, "GPU": 1, "memory": 90e9},
    "cpu_decoder": {"CPU": 32, "memory": 45e9},
}


@pytest.fixture
def cluster() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return config


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` does it: Ray's AWS defaults filled in, then Ray's schema."""
    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_ray_takes_it(cluster: dict[str, Any]) -> None:
    prepared = checked(cluster)
    assert prepared["provider"]["type"] == "aws"
    assert set(prepared["available_node_types"]) == NODE_TYPES
    assert prepared["head_node_type"] == "head"
    assert prepared["head_setup_commands"][: len(cluster["setup_commands"])] == cluster["setup_commands"]
    assert prepared["worker_setup_commands"] == cluster["setup_commands"]


def test_ray_would_refuse_a_slip(cluster: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        checked(cluster | {"idle_timeout": 10})
    with pytest.raises(ValueError, match="head_node_type"):
        checked(cluster | {"head_node_type": "haed"})


def test_workers_come_from_zero(cluster: dict[str, Any]) -> None:
    types = checked(cluster)["available_node_types"]
    assert types["head"]["max_workers"] == 0
    assert types["head"]["resources"] == {"CPU": 0}
    for name in NODE_TYPES - {"head"}:
        assert types[name]["min_workers"] == 0
        assert 0 < types[name]["max_workers"] <= cluster["max_workers"]
    assert types["cpu_decoder"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in types["gpu_worker"]["node_config"]
    assert sum(types[name]["max_workers"] for name in NODE_TYPES) <= cluster["max_workers"]
    assert cluster["idle_timeout_minutes"] > 0


def launched(cluster: dict[str, Any], gpus: int, cpus: int) -> dict[str, int]:
    """Nodes of each type that Ray's autoscaler starts on an empty cluster.

    gpus: workers of a run, which come together or not at all. cpus: decoding tasks that Ray Data asks to have room for.
    """
    types = {
        name: NodeTypeConfig(name, kind["min_workers"], kind["max_workers"], resources=RESOURCES[name])
        for name, kind in node_types(checked(cluster))
    }
    gang = GangResourceRequest(requests=[ResourceRequestUtil.make({"GPU": 1, "memory": 2**28})] * gpus)
    room = ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"CPU": 1})] * cpus)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=types,
        max_num_nodes=cluster["max_workers"],
        gang_resource_requests=[gang] if gpus else [],
        cluster_resource_constraints=[ClusterResourceConstraint(resource_requests=room)] if cpus else [],
    )
    return {launch.instance_type: launch.count for launch in ResourceDemandScheduler().schedule(request).to_launch}


def test_the_autoscaler_starts_what_is_needed(cluster: dict[str, Any]) -> None:
    assert launched(cluster, gpus=0, cpus=0) == {}
    assert launched(cluster, gpus=0, cpus=1) == {"cpu_decoder": 1}
    assert launched(cluster, gpus=4, cpus=0) == {"gpu_worker": 4}
    assert launched(cluster, gpus=4, cpus=4 * 32) == {"gpu_worker": 4, "cpu_decoder": 4}
    assert launched(cluster, gpus=0, cpus=640) == {
        "cpu_decoder": 16,
        "gpu_worker": 8,
    }  # GPU nodes for CPUs: last of all
    assert launched(cluster, gpus=0, cpus=641) == {}  # more than all of it: none
    assert launched(cluster, gpus=9, cpus=0) == {}  # more than the limit: none, rather than a part that waits and costs


def test_nothing_is_open_and_no_key_is_copied(cluster: dict[str, Any]) -> None:
    assert "security_group" not in cluster["provider"]
    for name, node_type in cluster["available_node_types"].items():
        config = node_type["node_config"]
        assert config["SecurityGroupIds"], name  # else Ray makes a group with SSH from anywhere
        assert config["KeyName"], name
        assert "instance-profile" in config["IamInstanceProfile"]["Arn"], name
        assert config["MetadataOptions"]["HttpTokens"] == "required", name
    profiles = {name: kind["node_config"]["IamInstanceProfile"]["Arn"] for name, kind in node_types(cluster)}
    assert profiles["head"] not in (profiles["gpu_worker"], profiles["cpu_decoder"])
    assert not re.search(r"aws_(access|secret)|AKIA[0-9A-Z]{16}", FILE.read_text())


def node_types(cluster: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list(cluster["available_node_types"].items())


def test_every_start_asks_for_the_token(cluster: dict[str, Any]) -> None:
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in cluster[key] if "ray start" in command]
        assert len(starts) == 1
        before, _, options = starts[0].partition("ray start")
        assert re.search(r"export [^;]*RAY_AUTH_MODE=token", before)
        assert "--dashboard-host" not in options or "--dashboard-host=127.0.0.1" in options
    assert "--head" in cluster["head_start_ray_commands"][1]
    assert "--autoscaling-config=" in cluster["head_start_ray_commands"][1]
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_nodes_get_the_locked_packages_and_nothing_names_a_registry(cluster: dict[str, Any]) -> None:
    mounted = {remote: local for remote, local in cluster["file_mounts"].items() if not local.startswith("~")}
    assert mounted == {"~/nev/requirements.lock": "requirements.lock"}
    assert (REPO / "requirements.lock").is_file()
    installs = [command for command in cluster["setup_commands"] if "requirements.lock" in command]
    assert len(installs) == 1
    assert "--require-hashes -r ~/nev/requirements.lock" in installs[0]
    text = FILE.read_text()
    assert "://" not in text.replace("http://localhost:8265", "")
    assert not re.search(r"index-url|find-links|\b[a-z0-9-]+\.(org|com|io|net)\b", text, re.IGNORECASE)


def test_commands_are_sound_shell(cluster: dict[str, Any]) -> None:
    keys = [key for key in cluster if key.endswith("_commands")]
    assert len(keys) == 4
    for command in (command for key in keys for command in cluster[key]):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_the_docs_name_what_is_to_be_filled_in(cluster: dict[str, Any]) -> None:
    docs = (REPO / "docs" / "cluster.md").read_text()
    for name in NODE_TYPES - {"head"}:
        assert f"`{name}`" in docs
    for placeholder in set(re.findall(r"YOUR-[A-Z-]+[A-Z]", FILE.read_text())):
        assert placeholder in docs, f"docs/cluster.md doesn't say what {placeholder} is"
