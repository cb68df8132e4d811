"""Every node type of cluster.yaml, started by Ray's own AWS provider at moto's EC2: botocore knows every field."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

moto = pytest.importorskip("moto", reason="moto is not installed: make setup")

pytestmark = pytest.mark.slow

REPO = Path(__file__).parents[2]
ZONE = "us-east-1a"


@pytest.fixture(scope="module")
def account() -> Iterator[dict[str, str]]:
    """An AWS account with what cluster.yaml wants to be filled in: the value of each placeholder."""
    import boto3

    with pytest.MonkeyPatch.context() as patch, moto.mock_aws():
        for name in ("AWS_PROFILE", "AWS_CONFIG_FILE"):
            patch.delenv(name, raising=False)
        ec2, iam = boto3.client("ec2", "us-east-1"), boto3.client("iam")
        (subnet,) = ec2.describe_subnets(Filters=[{"Name": "availability-zone", "Values": [ZONE]}])["Subnets"]
        group = ec2.create_security_group(GroupName="nev", Description="nev", VpcId=subnet["VpcId"])["GroupId"]
        ec2.create_key_pair(KeyName="nev")
        for name in ("nev-head", "nev-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        yield {
            "YOUR-SUBNET-ID": subnet["SubnetId"],
            "YOUR-SECURITY-GROUP-ID": group,
            "YOUR-AMI-ID": ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"],
            "YOUR-HEAD-PROFILE": "nev-head",
            "YOUR-WORKER-PROFILE": "nev-worker",
            "YOUR-ACCOUNT-ID": "123456789012",
            "YOUR-PLACEMENT-GROUP": "nev",
            "YOUR-KEY": "nev",
        }


@pytest.fixture(scope="module")
def cluster(account: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """cluster.yaml, filled in, as `ray up` completes it."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    text = (REPO / "cluster.yaml").read_text()
    for placeholder, value in account.items():
        text = text.replace(placeholder, value)
    config = yaml.safe_load(text)
    key = tmp_path_factory.mktemp("aws") / "key.pem"
    key.touch()
    config["auth"]["ssh_private_key"] = str(key)
    prepared = prepare_config(copy.deepcopy(config))
    complete = AWSNodeProvider.fillout_available_node_types_resources(prepared)
    written: dict[str, Any] = AWSNodeProvider.bootstrap_config(complete)
    return written


def test_ray_finds_the_same_cpus_and_gpus_and_keeps_the_memory(cluster: dict[str, Any]) -> None:
    written = yaml.safe_load((REPO / "cluster.yaml").read_text())["available_node_types"]
    for name, kind in cluster["available_node_types"].items():
        assert written[name]["resources"].items() <= kind["resources"].items()
        types = {key for key in kind["resources"] if key.startswith("accelerator_type:")}
        assert bool(types) == (written[name]["resources"].get("GPU", 0) > 0), name


def test_every_type_starts(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    provider = AWSNodeProvider(cluster["provider"], cluster["cluster_name"])
    for name, kind in cluster["available_node_types"].items():
        tags = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_USER_NODE_TYPE: name}
        (node,) = provider.create_node(kind["node_config"], tags, 1).values()
        instance = node.meta.client.describe_instances(InstanceIds=[node.id])["Reservations"][0]["Instances"][0]
        assert instance["InstanceType"] == kind["node_config"]["InstanceType"]
        assert instance["Placement"]["AvailabilityZone"] == ZONE
        assert {"Key": "ray-cluster-name", "Value": "nev"} in instance["Tags"], "what the policies go by"
        assert (instance.get("InstanceLifecycle") == "spot") == (name == "cpu_decoder")
