"""What is wrong with MLflow is said before a run starts, each with its way out; what fails at the end costs the copy alone."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from helpers.s3_server import Proxy
from helpers.tracking import experiment
from mlflow import MlflowClient

from nev.config.base import ConfigError
from nev.config.experiment import Tracking
from nev.runs.tracking import Tracker, open_run, tracking_uri
from nev.runs.tracking_check import check_tracking
from nev.storage.files import list_files


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return tracking_uri(Tracking(), str(tmp_path))


def start_run(uri: str, name: str, output: Path) -> Tracker:
    return open_run(uri, name, "a", experiment(), {}, str(output))


@contextmanager
def answering(status: int) -> Iterator[str]:
    """A server that answers every request with one status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_what_works_is_found_to_work_and_leaves_nothing(uri: str, tmp_path: Path) -> None:
    check_tracking(uri, "new")
    tracker = start_run(uri, "new", tmp_path)
    for run_id in (None, tracker.run_id):
        check_tracking(uri, "new", run_id)
    assert not [file for file in (tmp_path / "mlartifacts").rglob("*") if file.is_file()]
    assert MlflowClient(uri).list_artifacts(tracker.run_id) == []


def test_a_deleted_experiment_is_found_with_two_ways_out(uri: str, tmp_path: Path) -> None:
    start_run(uri, "gone", tmp_path)
    client = MlflowClient(uri)
    number = client.get_experiment_by_name("gone").experiment_id
    client.delete_experiment(number)
    with pytest.raises(
        ConfigError, match=rf"'gone' was deleted .*restore --experiment-id {number}.*tracking\.experiment="
    ):
        check_tracking(uri, "gone")
    check_tracking(uri, "another")
    client.restore_experiment(number)
    check_tracking(uri, "gone")


@pytest.mark.parametrize(
    "root", ["gs://bucket/x", "wasbs://c@a.blob.core.windows.net/x", "hdfs://node/x", "dbfs:/x", "made-up://x"]
)
def test_a_root_of_files_that_cannot_be_written_is_found_and_costs_the_copy_alone(
    root: str, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT", "1")
    monkeypatch.chdir(tmp_path)  # MLflow's store for dbfs makes a database in the working folder
    client = MlflowClient(uri)
    client.create_experiment("far", artifact_location=root)
    with pytest.raises(ConfigError, match=r"files of experiment 'far' go to .*, and cannot be written there \(\w+"):
        check_tracking(uri, "far")
    tracker = start_run(uri, "far", tmp_path)
    (tmp_path / "figure.png").write_bytes(b"figure")
    assert ": " in tracker.artifacts([str(tmp_path / "figure.png")], str(tmp_path))
    assert tracker.finish("FINISHED")
    assert client.get_run(tracker.run_id).info.status == "FINISHED"


def test_a_local_root_that_cannot_be_written_is_found(uri: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    MlflowClient(uri).create_experiment("near", artifact_location=(tmp_path / "file/artifacts").as_uri())
    with pytest.raises(ConfigError, match="files of experiment 'near' go to file://"):
        check_tracking(uri, "near")


def test_a_root_on_s3_is_tried_and_left_as_it_was(uri: str, s3: Proxy) -> None:
    MlflowClient(uri).create_experiment("bucket", artifact_location="s3://bucket/artifacts")
    s3.reset()
    check_tracking(uri, "bucket")
    assert s3.count("PUT") == 1
    assert list_files("s3://bucket/artifacts") == []
    MlflowClient(uri).create_experiment("absent", artifact_location="s3://absent-bucket/artifacts")
    with pytest.raises(ConfigError, match="files of experiment 'absent' go to s3://absent-bucket/artifacts"):
        check_tracking(uri, "absent")


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"wants to know who you are \(401\): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (403, r"refuses this user \(403\): ask for the right"),
        (404, "answers, and is no MLflow"),
    ],
)
def test_a_server_that_refuses(status: int, message: str) -> None:
    with answering(status) as server, pytest.raises(ConfigError, match=message):
        check_tracking(server)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "mysql://user:secret@127.0.0.1/db",
            "mysql://127.0.0.1/db needs the driver MySQLdb.*pip install 'mysqlclient'",
        ),
        ("sqlite://mlflow.db", "three slashes, or sqlite:////FOLDER/mlflow.db with four"),
        ("postgresql://user:secret@127.0.0.1:1/db", "MLflow at postgresql://127.0.0.1:1/db does not answer"),
        ("no-such-database://x", "unsupported URI"),
    ],
)
def test_an_address_that_cannot_be_used_names_no_password(
    address: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message) as refused:
        check_tracking(address)
    assert "secret" not in str(refused.value)


def test_a_server_that_does_not_answer_is_found_before_the_run(uri: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConfigError, match=rf"MLflow at http://127.0.0.1:{port} does not answer"):
        check_tracking(f"http://127.0.0.1:{port}")
    check_tracking(uri)
