"""deploy/aws/*_policy.json: well formed, no action by a star, and no more than cluster.yaml needs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).parents[2]
FOLDER = REPO / "deploy" / "aws"
POLICIES = ["head_policy", "launcher_policy", "worker_policy"]


def statements(name: str) -> list[dict[str, Any]]:
    policy = json.loads((FOLDER / f"{name}.json").read_text())
    assert policy["Version"] == "2012-10-17"
    assert set(policy) == {"Version", "Statement"}
    return list(policy["Statement"])


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def actions(name: str) -> set[str]:
    return {action for statement in statements(name) for action in listed(statement["Action"])}


@pytest.mark.parametrize("name", POLICIES)
def test_every_right_is_named(name: str) -> None:
    seen = set()
    for statement in statements(name):
        assert statement["Effect"] == "Allow"
        assert set(statement) <= {"Sid", "Effect", "Action", "Resource", "Condition"}
        assert re.fullmatch(r"\w+", statement["Sid"])
        seen.add(statement["Sid"])
        for action in listed(statement["Action"]):
            assert re.fullmatch(r"(ec2|s3|iam):[A-Z]\w+", action), action  # no star
        for resource in listed(statement["Resource"]):
            if resource == "*":  # AWS knows no smaller resource for these
                assert all(action.startswith("ec2:Describe") for action in listed(statement["Action"]))
            else:
                assert re.match(r"arn:aws:(ec2:us-east-1|s3|iam):", resource), resource
    assert len(seen) == len(statements(name))


def test_only_ec2_takes_the_roles() -> None:
    (statement,) = json.loads((FOLDER / "trust_policy.json").read_text())["Statement"]
    assert statement["Principal"] == {"Service": "ec2.amazonaws.com"}
    assert statement["Action"] == "sts:AssumeRole"


def test_workers_reach_s3_alone_and_remove_nothing_but_runs() -> None:
    assert all(action.startswith("s3:") for action in actions("worker_policy"))
    for name in ("worker_policy", "head_policy"):
        (removes,) = [item for item in statements(name) if "s3:DeleteObject" in listed(item["Action"])]
        assert all(re.search("YOUR-BUCKET/(runs|mlflow)/", resource) for resource in removes["Resource"])
    assert not [action for action in actions("launcher_policy") if action.startswith("s3:")]


def start_statement(name: str) -> dict[str, Any]:
    (statement,) = [item for item in statements(name) if item["Sid"] == "StartTheseMachines"]
    return statement


def test_each_starts_the_machines_of_cluster_yaml_alone_with_the_role_that_is_theirs() -> None:
    cluster = yaml.safe_load((REPO / "cluster.yaml").read_text())
    machines = {name: kind["node_config"] for name, kind in cluster["available_node_types"].items()}
    head = machines.pop(cluster["head_node_type"])
    for policy, configs in (("launcher_policy", [head]), ("head_policy", list(machines.values()))):
        conditions = start_statement(policy)["Condition"]["StringEquals"]
        assert set(conditions["ec2:InstanceType"]) == {config["InstanceType"] for config in configs}
        assert {conditions["ec2:InstanceProfile"]} == {config["IamInstanceProfile"]["Arn"] for config in configs}
        assert conditions["aws:RequestTag/ray-cluster-name"] == cluster["cluster_name"]


@pytest.mark.parametrize("name", ["head_policy", "launcher_policy"])
def test_only_the_cluster_s_own_machines_can_be_ended(name: str) -> None:
    cluster = yaml.safe_load((REPO / "cluster.yaml").read_text())
    for statement in statements(name):
        if "ec2:TerminateInstances" in listed(statement["Action"]):
            tags = statement["Condition"]["StringEquals"]
            assert tags == {"aws:ResourceTag/ray-cluster-name": cluster["cluster_name"]}
        if "iam:PassRole" in listed(statement["Action"]):
            assert statement["Condition"]["StringEquals"] == {"iam:PassedToService": "ec2.amazonaws.com"}
            assert not listed(statement["Resource"])[0].endswith("*")


def test_the_docs_name_what_is_to_be_filled_in() -> None:
    docs = (REPO / "docs" / "cluster.md").read_text()
    for file in FOLDER.iterdir():
        if file.suffix == ".json":
            for placeholder in set(re.findall(r"YOUR-[A-Z-]+[A-Z]", file.read_text())):
                assert placeholder in docs, f"docs/cluster.md doesn't say what {placeholder} is"
