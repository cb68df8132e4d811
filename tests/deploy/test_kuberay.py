"""deploy/kuberay/rayjob.yaml, by KubeRay's schema, by Ray's own reading of it, and by nev's command line."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml
from helpers.node_types import refuse_too_small
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import validate_config
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import (  # type: ignore[attr-defined]
    ClusterResourceConstraint,
    GangResourceRequest,
)

from nev.cluster.session import RAY_STOP_WAIT_S
from nev.commands.main import app
from nev.config.experiment import Experiment
from nev.config.file import load

REPO = Path(__file__).parents[2]
FILE = REPO / "deploy" / "kuberay" / "rayjob.yaml"


@pytest.fixture
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(FILE.read_text()))


@pytest.fixture
def job(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return documents[-1]


@pytest.fixture(scope="module")
def kuberay() -> jsonschema.Draft202012Validator:
    """Checks by KubeRay's schema, which refuse a key that it does not know."""
    beside = Path(os.environ.get("NEV_DATA", "")).absolute().parent / "kuberay"
    files = sorted(beside.glob("rayjob-*.openapi.json")) if "NEV_DATA" in os.environ else []
    if not files:
        pytest.skip("KubeRay's schema is not there: the folder kuberay beside NEV_DATA")
    return jsonschema.Draft202012Validator(strict(json.loads(files[-1].read_text())))


def strict(node: Any) -> Any:
    if isinstance(node, list):
        return [strict(part) for part in node]
    if not isinstance(node, dict):
        return node
    made = {key: strict(part) for key, part in node.items()}
    if made.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    if isinstance(made.get("properties"), dict) and "additionalProperties" not in made:
        made["additionalProperties"] = False
    return made


def cluster(job: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = job["spec"]["rayClusterSpec"]
    return spec


def pods(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pod templates by name."""
    spec = cluster(job)
    workers = {group["groupName"]: group["template"]["spec"] for group in spec["workerGroupSpecs"]}
    submitter = job["spec"]["submitterPodTemplate"]["spec"]
    return {"submitter": submitter, "head": spec["headGroupSpec"]["template"]["spec"], **workers}


def test_kuberay_takes_it(job: dict[str, Any], kuberay: jsonschema.Draft202012Validator) -> None:
    assert job["apiVersion"] == "ray.io/v1"
    kuberay.validate(job)


@pytest.mark.parametrize("where", ["spec", "rayClusterSpec", "container"])
def test_kuberay_would_refuse_a_slip(where: str, job: dict[str, Any], kuberay: jsonschema.Draft202012Validator) -> None:
    slip = copy.deepcopy(job)
    places = {
        "spec": slip["spec"],
        "rayClusterSpec": cluster(slip),
        "container": pods(slip)["cpu-decoder"]["containers"][0],
    }
    places[where]["backOffLimit"] = 3
    with pytest.raises(jsonschema.ValidationError, match="backOffLimit"):
        kuberay.validate(slip)


def autoscaling_config(job: dict[str, Any]) -> dict[str, Any]:
    """What Ray's autoscaler makes of the RayCluster in its pod on the head."""
    spec = copy.deepcopy(cluster(job))
    config: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "nev", "namespace": "default"}, "spec": spec}
    )
    validate_config(config)
    return config


def test_ray_reads_two_groups_that_start_at_none(job: dict[str, Any]) -> None:
    types = autoscaling_config(job)["available_node_types"]
    head = types.pop("headgroup")
    assert head["resources"]["CPU"] == 0
    assert set(types) == {"gpu-worker", "cpu-decoder"}
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in types.values())
    assert all(group["replicas"] == 0 for group in cluster(job)["workerGroupSpecs"])
    assert types["gpu-worker"]["resources"]["GPU"] == 1
    assert "GPU" not in types["cpu-decoder"]["resources"]
    assert types["cpu-decoder"]["labels"] == {"nev.io/role": "decoder"}
    assert not types["gpu-worker"]["labels"]
    assert 0 < types["cpu-decoder"]["idle_timeout_s"] < types["gpu-worker"]["idle_timeout_s"]
    assert cluster(job)["autoscalerOptions"]["version"] == "v2"


def launched(job: dict[str, Any], gpus: int = 0, cpus: int = 0) -> dict[str, int]:
    """Pods of each group that Ray's autoscaler asks for on an empty cluster, for a gang of `gpus` and room for `cpus` tasks."""
    config = autoscaling_config(job)
    types = {
        name: NodeTypeConfig(
            name,
            kind["min_workers"],
            kind["max_workers"],
            resources=kind["resources"],
            labels=kind["labels"],
        )
        for name, kind in config["available_node_types"].items()
    }
    gang = GangResourceRequest(requests=[ResourceRequestUtil.make({"GPU": 1, "memory": 2**28})] * gpus)
    room = ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"CPU": 1})] * cpus)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=types,
        max_num_nodes=config["max_workers"],
        gang_resource_requests=[gang] if gpus else [],
        cluster_resource_constraints=[ClusterResourceConstraint(resource_requests=room)] if cpus else [],
    )
    return {launch.instance_type: launch.count for launch in ResourceDemandScheduler().schedule(request).to_launch}


def test_the_autoscaler_starts_what_is_needed(job: dict[str, Any]) -> None:
    assert launched(job) == {}
    assert launched(job, gpus=16) == {"gpu-worker": 16}
    assert launched(job, cpus=1) == {"cpu-decoder": 1}
    assert launched(job, gpus=4, cpus=61) == {"gpu-worker": 4, "cpu-decoder": 3}
    assert launched(job, cpus=16 * 30 + 1) == {"cpu-decoder": 16, "gpu-worker": 1}  # GPU nodes for CPUs: last of all
    assert launched(job, gpus=17) == {}


def test_every_shipped_experiment_has_room(job: dict[str, Any]) -> None:
    refuse_too_small(autoscaling_config(job)["available_node_types"])


def options(job: dict[str, Any]) -> dict[str, Any]:
    """The entrypoint's options, as `nev train` reads them."""
    command, name, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (command, name) == ("nev", "train")
    group: Any = typer.main.get_command(app)
    with group.make_context("nev", ["train", *arguments], resilient_parsing=True) as context:
        found: dict[str, Any] = group.get_command(context, name).make_context(name, arguments).params
        return found


def test_the_entrypoint_is_a_run_that_resumes(job: dict[str, Any]) -> None:
    given = options(job)
    config: Experiment = load(given["config"], given["overrides"])
    assert config.output.startswith("s3://")
    assert any(setting.startswith("name=") for setting in given["overrides"])
    assert config.tracking.uri
    assert config.tracking.uri.startswith("https://")
    assert job["spec"]["backoffLimit"] > 0
    assert "gcsFaultToleranceOptions" not in cluster(job)
    assert "runtimeEnvYAML" not in job["spec"]  # the code is in the image


def test_there_is_time_for_a_checkpoint(job: dict[str, Any]) -> None:
    head, *workers = (pods(job)[name] for name in ("head", "gpu-worker", "cpu-decoder"))
    wait = {variable["name"]: variable for variable in head["containers"][0]["env"]}["RAY_JOB_STOP_WAIT_TIME_S"]
    assert RAY_STOP_WAIT_S < float(wait["value"]) < head["terminationGracePeriodSeconds"]
    for pod in workers:
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        deadline = re.search(r"--deadline-remaining-seconds (\d+) && sleep (\d+)", command)
        assert deadline
        assert 15 + int(deadline[2]) < pod["terminationGracePeriodSeconds"]
        assert pod["terminationGracePeriodSeconds"] <= 120  # a spot machine's notice


def test_the_head_knows_of_decoders_and_tasks_are_packed_everywhere(job: dict[str, Any]) -> None:
    values = {
        name: {variable["name"]: variable.get("value") for variable in pods(job)[name]["containers"][0]["env"]}
        for name in ("head", "gpu-worker", "cpu-decoder")
    }
    assert values["head"]["NEV_DECODERS"] == "1"
    start = " ".join(yaml.safe_load((REPO / "cluster.yaml").read_text())["head_start_ray_commands"])
    for name, value in values["head"].items():
        if name.startswith("RAY_"):
            assert f" {name}={value}" in start, "as on AWS"
    for pod in values.values():
        assert (pod["RAY_scheduler_spread_threshold"], pod["RAY_scheduler_top_k_fraction"]) == ("1", "0")


def test_hooks_are_sound_and_ray_has_the_options(job: dict[str, Any]) -> None:
    from ray.scripts.scripts import drain_node

    head, worker = (pods(job)[name]["containers"][0]["lifecycle"]["preStop"]["exec"] for name in ("head", "gpu-worker"))
    compile(head["command"][2], "preStop", "exec")
    assert subprocess.run(["bash", "-n", "-c", worker["command"][-1]], check=False).returncode == 0
    known = {name for option in drain_node.params for name in option.opts}
    assert set(re.findall(r"--[a-z-]+", worker["command"][-1])) <= known


def test_start_options_are_ray_s(job: dict[str, Any]) -> None:
    from ray.scripts.scripts import start

    known = {name for option in start.params for name in option.opts}
    groups = [cluster(job)["headGroupSpec"], *cluster(job)["workerGroupSpecs"]]
    for group in groups:
        assert {f"--{name}" for name in group["rayStartParams"]} <= known
        limit = group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
        assert int(group["rayStartParams"]["object-store-memory"]) < 0.4 * int(limit.removesuffix("Gi")) * 2**30
    assert cluster(job)["rayVersion"] in re.findall(r"^ray==(\S+)", (REPO / "requirements.lock").read_text(), re.M)


def test_spill_lies_on_a_volume_of_its_own(job: dict[str, Any]) -> None:
    for group in cluster(job)["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        place = group["rayStartParams"]["object-spilling-directory"]
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert "ephemeral" in {volume["name"]: volume for volume in pod["volumes"]}[mounts[place]]


def test_no_pod_has_more_rights_than_it_needs(documents: list[dict[str, Any]], job: dict[str, Any]) -> None:
    accounts = {document["metadata"]["name"]: document for document in documents[:-1]}
    assert {document["kind"] for document in accounts.values()} == {
        "ServiceAccount"
    }  # no Role: KubeRay makes the head's
    for name, pod in pods(job).items():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
        if name == "head":
            assert pod["serviceAccountName"] == "nev-head"
        else:
            assert pod["automountServiceAccountToken"] is False
            assert pod.get("serviceAccountName", "nev-worker") == "nev-worker"
    assert accounts["nev-worker"]["automountServiceAccountToken"] is False
    assert cluster(job)["authOptions"] == {"mode": "token"}
    assert cluster(job)["autoscalerOptions"]["securityContext"]["allowPrivilegeEscalation"] is False


def test_secrets_come_from_a_secret(job: dict[str, Any]) -> None:
    for pod in pods(job).values():
        for variable in pod["containers"][0].get("env", []):
            if re.search("PASSWORD|TOKEN|SECRET|KEY|USERNAME", variable["name"]):
                assert variable["valueFrom"]["secretKeyRef"]["name"] == "nev"
    assert not re.search(r"AKIA[0-9A-Z]{16}|hf_[A-Za-z]{10}", FILE.read_text())


def test_the_docs_name_what_is_to_be_filled_in() -> None:
    docs = (REPO / "docs" / "deploy.md").read_text()
    for placeholder in set(re.findall(r"YOUR-[A-Z-]+[A-Z]", FILE.read_text())):
        assert placeholder in docs, f"docs/deploy.md doesn't say what {placeholder} is"
