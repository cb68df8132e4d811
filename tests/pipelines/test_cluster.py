"""cluster.yaml, by Ray's own rules and by ours. Neither AWS nor its SDK is asked."""

from __future__ import annotations

import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from helpers.node_types import refuse_too_small
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig, NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import (  # type: ignore[attr-defined]
    ClusterResourceConstraint,
    GangResourceRequest,
)
from ray.core.generated.common_pb2 import LabelSelectorOperator  # type: ignore[attr-defined]

from nev.cluster.session import RAY_STOP_WAIT_S

REPO = Path(__file__).parents[2]
FILE = REPO / "cluster.yaml"
DECODERS = ["cpu_decoder", "cpu_decoder_on_demand"]
NODE_TYPES = {"head", "gpu_worker", "p5_worker", *DECODERS}
DECODER = [[("nev.io/role", LabelSelectorOperator.LABEL_OPERATOR_IN, ["decoder"])]]


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
        assert types[name]["max_workers"] <= cluster["max_workers"]
        assert (types[name]["max_workers"] == 0) == (name == "p5_worker")
    assert sum(types[name]["max_workers"] for name in NODE_TYPES) <= cluster["max_workers"]


def test_only_decoders_are_spot_and_have_the_label(cluster: dict[str, Any]) -> None:
    spot = {name for name, kind in node_types(cluster) if "InstanceMarketOptions" in kind["node_config"]}
    assert spot == {"cpu_decoder"}
    decoders = {name for name, kind in node_types(cluster) if kind["labels"].get("nev.io/role") == "decoder"}
    assert decoders == set(DECODERS)
    assert {name for name, kind in node_types(cluster) if kind["labels"].get("ray.io/market-type") == "spot"} == spot
    spot_type, fallback = (cluster["available_node_types"][name] for name in DECODERS)
    assert spot_type["resources"] == fallback["resources"]
    assert spot_type["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot_type["node_config"] == fallback["node_config"]


def test_a_node_says_its_instance_type_whose_price_is_known(cluster: dict[str, Any]) -> None:
    prices = yaml.safe_load((REPO / "nev/planner/prices.yaml").read_text())["instances"]
    for name, kind in node_types(cluster):
        assert kind["labels"]["nev.io/instance-type"] == kind["node_config"]["InstanceType"], name
        assert kind["node_config"]["InstanceType"] in prices, name


def test_a_type_has_its_own_time_without_work(cluster: dict[str, Any]) -> None:
    types = autoscaler_types(cluster)
    times = {name: types[name].idle_timeout_s for name in NODE_TYPES - {"head"}}
    assert times == {"gpu_worker": 600, "p5_worker": 600, "cpu_decoder": 120, "cpu_decoder_on_demand": 120}


def autoscaler_types(cluster: dict[str, Any]) -> dict[str, NodeTypeConfig]:
    """The node types as Ray's autoscaler reads them, but for the key file, which is not here."""
    config = checked(cluster)
    config["auth"].pop("ssh_private_key")
    types: dict[str, NodeTypeConfig] = AutoscalingConfig(config, skip_content_hash=True).get_node_type_configs()
    return types


def launched(cluster: dict[str, Any], gpus: int = 0, cpus: int = 0, **settings: Any) -> dict[str, int]:
    """Nodes of each type that Ray's autoscaler starts on an empty cluster.

    gpus: workers of a run, which come together or not at all. cpus: decoding tasks that nev asks to have room for.
    settings: further fields of Ray's request.
    """
    gang = GangResourceRequest(requests=[ResourceRequestUtil.make({"GPU": 1, "memory": 2**28})] * gpus)
    room = ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"CPU": 1}, label_selectors=DECODER)] * cpus)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=autoscaler_types(cluster),
        max_num_nodes=cluster["max_workers"],
        gang_resource_requests=[gang] if gpus else [],
        cluster_resource_constraints=[ClusterResourceConstraint(resource_requests=room)] if cpus else [],
        **settings,
    )
    return {launch.instance_type: launch.count for launch in ResourceDemandScheduler().schedule(request).to_launch}


def test_the_autoscaler_starts_what_is_needed(cluster: dict[str, Any]) -> None:
    assert launched(cluster) == {}
    assert launched(cluster, cpus=1) == {"cpu_decoder": 1}
    assert launched(cluster, gpus=4) == {"gpu_worker": 4}
    assert launched(cluster, gpus=4, cpus=4 * 32) == {"gpu_worker": 4, "cpu_decoder": 4}  # no decoding beside the GPUs
    assert launched(cluster, cpus=17 * 32) == {"cpu_decoder": 16, "cpu_decoder_on_demand": 1}
    assert launched(cluster, cpus=32 * 32 + 1) == {}  # more than all of it: none
    assert launched(cluster, gpus=17) == {}  # more than the limit: none, rather than a part that waits and costs


def test_a_decoder_on_demand_comes_where_the_spot_type_is_at_its_limit(cluster: dict[str, Any]) -> None:
    cluster["available_node_types"]["cpu_decoder"]["max_workers"] = 0  # as deploy/aws/fallback.py sets it
    assert launched(cluster, cpus=3 * 32) == {"cpu_decoder_on_demand": 3}


def test_p5_comes_in_the_place_of_gpu_worker(cluster: dict[str, Any]) -> None:
    cluster["available_node_types"]["gpu_worker"]["max_workers"] = 0
    cluster["available_node_types"]["p5_worker"]["max_workers"] = 2
    assert launched(cluster, gpus=16) == {"p5_worker": 2}


def test_every_shipped_experiment_has_room(cluster: dict[str, Any]) -> None:
    refuse_too_small(cluster["available_node_types"])


def test_node_types_are_those_of_the_planner_on_its_day(cluster: dict[str, Any]) -> None:
    hardware = yaml.safe_load((REPO / "nev" / "planner" / "hardware.yaml").read_text())
    prices = yaml.safe_load((REPO / "nev" / "planner" / "prices.yaml").read_text())
    for name, kind in node_types(cluster):
        instance = kind["node_config"]["InstanceType"]
        node, price = hardware["nodes"][instance], prices["instances"][instance]
        assert price["on_demand"] > 0
        if name != "head":
            assert (kind["resources"]["CPU"], kind["resources"].get("GPU", 0)) == (node["vcpus"], node["gpus"]), name
        if "InstanceMarketOptions" in kind["node_config"]:
            assert price["spot"] < price["on_demand"]
    assert f"Node types are of {prices['date']}" in FILE.read_text()


def test_efa_is_on_every_network_card_of_a_p5(cluster: dict[str, Any]) -> None:
    config = cluster["available_node_types"]["p5_worker"]["node_config"]
    cards = config["NetworkInterfaces"]
    assert [card["NetworkCardIndex"] for card in cards] == list(range(32))
    assert [card["DeviceIndex"] for card in cards] == [0] + [1] * 31
    assert {card["InterfaceType"] for card in cards} == {"efa"}
    assert config["Placement"]["GroupName"]
    assert "SubnetIds" not in config  # Ray takes them in the interfaces alone


def test_nothing_is_open_and_no_key_is_copied(cluster: dict[str, Any]) -> None:
    assert "security_group" not in cluster["provider"]
    for name, node_type in cluster["available_node_types"].items():
        config = node_type["node_config"]
        cards = config.get("NetworkInterfaces", [])
        # else Ray makes a group with SSH from anywhere
        assert config.get("SecurityGroupIds") or (cards and all(card["Groups"] for card in cards)), name
        assert config["KeyName"], name
        assert "instance-profile" in config["IamInstanceProfile"]["Arn"], name
        assert config["MetadataOptions"]["HttpTokens"] == "required", name
    profiles = {name: kind["node_config"]["IamInstanceProfile"]["Arn"] for name, kind in node_types(cluster)}
    assert profiles.pop("head") not in profiles.values()
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
    assert "--head" in start_command(cluster, "head")
    assert "--autoscaling-config=" in start_command(cluster, "head")
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def start_command(cluster: dict[str, Any], kind: str) -> str:
    (command,) = [command for command in cluster[f"{kind}_start_ray_commands"] if "ray start" in command]
    return str(command)


def test_start_options_and_variables_are_ray_s(cluster: dict[str, Any]) -> None:
    from ray.scripts.scripts import start

    known = {name for option in start.params for name in option.opts}
    folder = Path(ray.__file__).parent
    core = (folder / "core" / "src" / "ray" / "gcs" / "gcs_server").read_bytes()
    dashboard = (folder / "dashboard" / "modules" / "event" / "event_head.py").read_text()
    for kind in ("head", "worker"):
        command = start_command(cluster, kind)
        assert set(re.findall(r"(?<= )--[a-z-]+", command)) <= known
        others = {
            "RAY_JOB_STOP_WAIT_TIME_S",
            "RAY_HEAD_IP",
            "NEV_DECODERS",
        }  # of Ray's job server, Ray's launcher, and nev
        for name in set(re.findall(r"\b(?:RAY|NEV)_\w+", command)) - others:
            assert f"{name}\0".encode() in core or f'"{name}"' in dashboard, f"{name}: Ray knows no such variable"


def test_the_head_knows_of_decoders_and_waits_for_a_checkpoint(cluster: dict[str, Any]) -> None:
    head = start_command(cluster, "head")
    assert " NEV_DECODERS=1 " in head
    wait = re.search(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", head)
    assert wait
    assert int(wait[1]) > RAY_STOP_WAIT_S
    for kind in ("head", "worker"):  # tasks are packed, wherever they are scheduled
        assert "RAY_scheduler_spread_threshold=1 RAY_scheduler_top_k_fraction=0" in start_command(cluster, kind)


def test_the_object_store_and_the_tasks_fit_into_a_node(cluster: dict[str, Any]) -> None:
    store = re.search(r"--object-store-memory=(\d+)", start_command(cluster, "worker"))
    assert store
    memory = {"g6e.4xlarge": 128, "p5.48xlarge": 2048, "c7i.8xlarge": 64}  # GiB
    for name, kind in node_types(cluster):
        if name != "head":
            total = memory[kind["node_config"]["InstanceType"]] * 2**30
            assert 0.8 * total < kind["resources"]["memory"] + int(store[1]) < 0.97 * total, name


def test_a_forgotten_cluster_ends(cluster: dict[str, Any]) -> None:
    for kind in ("head", "worker"):
        assert "sudo shutdown -h +20160" in cluster[f"{kind}_start_ray_commands"]
    for name, kind in node_types(cluster):
        assert kind["node_config"]["InstanceInitiatedShutdownBehavior"] == "terminate", name


def test_every_agent_is_there(cluster: dict[str, Any]) -> None:
    agents = {
        kind: [
            match[1]
            for command in cluster[f"{kind}_start_ray_commands"]
            if (match := re.fullmatch(r"bash ~/nev/aws/agent\.sh (\w+).*", command))
        ]
        for kind in ("head", "worker")
    }
    assert agents == {"head": ["ship_logs", "fallback"], "worker": ["spot_notice", "end_orphan", "ship_logs"]}
    named = {*(f"{agent}.py" for agent in (*agents["head"], *agents["worker"])), "agent.sh"}
    named |= {
        match[1] for command in cluster["setup_commands"] if (match := re.match(r"bash ~/nev/aws/(\S+)", command))
    }
    assert all((REPO / "deploy" / "aws" / name).is_file() for name in named)


def test_nodes_get_the_locked_packages_and_nothing_names_a_registry(cluster: dict[str, Any]) -> None:
    mounted = {remote: local for remote, local in cluster["file_mounts"].items() if not local.startswith("~")}
    assert mounted == {"~/nev/requirements.lock": "requirements.lock", "~/nev/aws": "deploy/aws"}
    assert all((REPO / local).exists() for local in mounted.values())
    assert "bash ~/nev/aws/install.sh" in cluster["setup_commands"]
    install = (REPO / "deploy" / "aws" / "install.sh").read_text()
    assert "--require-hashes -r ~/nev/requirements.lock" in install
    text = re.sub(r"\b(nev|ray)\.io/[a-z-]+:", "", FILE.read_text())  # a label is no host
    assert not re.search(r"index-url|find-links|\b[a-z0-9-]+\.(org|com|io|net)\b", text + install, re.IGNORECASE)
    assert not re.search(r"(?<!s3)://", text.replace("http://localhost:8265", "") + install)


def test_commands_are_sound_shell(cluster: dict[str, Any]) -> None:
    keys = [key for key in cluster if key.endswith("_commands")]
    assert len(keys) == 4
    scripts = sorted((REPO / "deploy" / "aws").glob("*.sh"))
    assert len(scripts) == 3
    for script in scripts:
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    for command in (command for key in keys for command in cluster[key]):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_the_docs_name_what_is_to_be_filled_in(cluster: dict[str, Any]) -> None:
    docs = (REPO / "docs" / "cluster.md").read_text()
    for name in NODE_TYPES - {"head"}:
        assert f"`{name}`" in docs
    for placeholder in set(re.findall(r"YOUR-[A-Z-]+[A-Z]", FILE.read_text())):
        assert placeholder in docs, f"docs/cluster.md doesn't say what {placeholder} is"
