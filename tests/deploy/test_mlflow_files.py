"""deploy/mlflow as files: no secret in them, nothing open to the network, one MLflow for server and clients."""

from __future__ import annotations

import configparser
import re
import subprocess
from typing import Any

import pytest
import yaml

from benchmarks.contestants.mlflow_servers import FOLDER, VARIABLE, read_service

SECRETS = {"POSTGRES_PASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"}


@pytest.fixture
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    return loaded


def test_a_secret_comes_from_the_environment_and_has_no_default(compose: dict[str, Any]) -> None:
    text = (FOLDER / "compose.yaml").read_text()
    demanded = {match["name"] for match in VARIABLE.finditer(text) if match["kind"] == "?"}
    assert demanded == SECRETS | {"MLFLOW_ARTIFACTS"}
    for service in compose["services"].values():
        for name, value in (service.get("environment") or {}).items():
            if re.search("PASSWORD|SECRET|TOKEN|KEY", name):
                assert VARIABLE.fullmatch(value), name
    with pytest.raises(KeyError, match="POSTGRES_PASSWORD"):
        read_service("mlflow", {})


def test_the_example_names_every_variable_and_fills_none() -> None:
    lines = [line for line in (FOLDER / "env.example").read_text().splitlines() if re.match(r"#?[A-Z_]+=", line)]
    assert all(line.endswith("=") for line in lines)
    named = {line.strip("#=") for line in lines}
    assert named == {match["name"] for match in VARIABLE.finditer((FOLDER / "compose.yaml").read_text())}
    done = subprocess.run(["git", "check-ignore", "-q", str(FOLDER / ".env")], cwd=FOLDER, check=False)
    assert done.returncode == 0


def test_only_this_machine_reaches_it(compose: dict[str, Any]) -> None:
    assert "ports" not in compose["services"]["postgres"]
    assert all(str(port).startswith("127.0.0.1:") for port in compose["services"]["mlflow"]["ports"])


def test_users_are_kept_in_postgresql_and_a_right_password_is_remembered() -> None:
    auth = configparser.ConfigParser()
    auth.read(FOLDER / "basic_auth.ini")
    settings = auth["mlflow"]
    assert settings["database_uri"].startswith("postgresql+psycopg:///")
    assert "CREATE DATABASE mlflow_auth" in (FOLDER / "init.sql").read_text()
    assert settings["database_uri"].endswith("/mlflow_auth")
    assert settings.getint("auth_cache_ttl_seconds") > 0
    assert "admin_password" not in settings


def test_images_are_pinned_and_tables_come_first(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert re.fullmatch(r"postgres:\d+\.\d+-\w+", services["postgres"]["image"])
    assert services["tables"]["image"] == services["mlflow"]["image"]
    assert services["mlflow"]["depends_on"] == {"tables": {"condition": "service_completed_successfully"}}
    assert read_service("mlflow", dict.fromkeys([*SECRETS, "MLFLOW_ARTIFACTS"], "x")).command[:2] == [
        "mlflow",
        "server",
    ]
