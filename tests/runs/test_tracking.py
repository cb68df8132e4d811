"""MLflow on SQLite and on PostgreSQL: one run a training run, nothing lost while the server is away."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.tracking import experiment
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from nev.config.experiment import Tracking
from nev.config.file import flatten
from nev.runs.tracking import Tracker, open_run, tracking_uri

POSTGRES = Path("/usr/lib/postgresql/15/bin")


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tracking_uri(Tracking(), str(tmp_path_factory.mktemp("sqlite")))


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server of our own, on loopback, ended by its process id."""
    initdb = shutil.which("initdb") or (str(POSTGRES / "initdb") if (POSTGRES / "initdb").exists() else None)
    if not initdb:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    programs = Path(initdb).resolve().parent
    folder = tmp_path_factory.mktemp("postgres")
    user: dict[str, Any] = {}
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        shutil.chown(folder, "postgres")
        for parent in folder.parents[:3]:
            parent.chmod(0o755)
        user = {"user": "postgres"}
    subprocess.run([initdb, "-D", folder / "db", "-A", "trust", "-U", "nev"], check=True, capture_output=True, **user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [programs / "postgres", "-D", folder / "db", "-p", str(port), "-h", "127.0.0.1", "-k", folder]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **user)
    ready = [programs / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-t", "30"]
    try:
        for _ in range(100):
            if subprocess.run(ready, capture_output=True, check=False).returncode == 0:
                break
            if server.poll() is not None:
                pytest.fail("PostgreSQL ended at its start")
        subprocess.run(
            [programs / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "nev", "mlflow"],
            check=True, capture_output=True,
        )  # fmt: skip
        yield f"postgresql+psycopg2://nev@127.0.0.1:{port}/mlflow"
    finally:
        server.send_signal(signal.SIGINT)  # "fast": ends the clients too
        server.wait(30)


@pytest.fixture(params=["sqlite", "postgres"])
def uri(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


@pytest.mark.slow
def test_a_run_holds_parameters_metrics_tags_and_artifacts(uri: str, tmp_path: Path) -> None:
    config = experiment()
    tracker = open_run(uri, f"nev-{tmp_path.name}", config.name, config, {"nev.data_fingerprint": "abc"}, str(tmp_path))
    for step in range(1, 4):
        tracker.log(step, {"loss": 1 / step, "zero_shot/top1": step / 10})
    tracker.flush()
    (tmp_path / "note.txt").write_text("hello")
    tracker.artifact(tmp_path / "note.txt")
    tracker.finish("FINISHED")

    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(tracker.run_id)
    assert run.data.params == {key: str(value) for key, value in flatten(config).items()}
    assert run.data.params["optim.lr"] == "0.001"
    assert run.data.tags["nev.data_fingerprint"] == "abc"
    assert len(run.data.tags["mlflow.source.git.commit"]) == 40
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "tracked"
    assert tracker.history("zero_shot/top1") == ([1, 2, 3], [0.1, 0.2, 0.3])
    assert [artifact.path for artifact in client.list_artifacts(tracker.run_id)] == ["note.txt"]


def test_a_continued_run_is_the_same_run_and_repeated_steps_are_there_once(uri: str, tmp_path: Path) -> None:
    config, name = experiment(), f"nev-{tmp_path.name}"
    first = open_run(uri, name, config.name, config, {}, str(tmp_path))
    first.log(1, {"loss": 3.0})
    first.log(2, {"loss": 9.0})
    first.finish("FAILED")
    again = open_run(uri, name, config.name, config, {}, str(tmp_path), run_id=first.run_id)
    again.log(2, {"loss": 2.0})
    again.log(3, {"loss": 1.0}, time_ms=5)
    again.log(3, {"loss": 0.5})
    again.finish("FINISHED")
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(name)
    assert found
    assert len(client.search_runs([found.experiment_id])) == 1
    assert again.history("loss") == ([1, 2, 3], [3.0, 9.0, 1.0])
    assert len(client.get_metric_history(first.run_id, "loss")) == 3


def test_children_know_their_parent(uri: str, tmp_path: Path) -> None:
    config, name = experiment(), f"nev-{tmp_path.name}"
    parent = open_run(uri, name, "sweep", config, {}, str(tmp_path))
    child = open_run(uri, name, "trial", config, {"mlflow.parentRunId": parent.run_id}, str(tmp_path))
    tags = MlflowClient(tracking_uri=uri).get_run(child.run_id).data.tags
    assert tags["mlflow.parentRunId"] == parent.run_id


def test_more_metrics_than_one_call_takes(sqlite: str, tmp_path: Path) -> None:
    config = experiment()
    tracker = open_run(sqlite, f"nev-{tmp_path.name}", config.name, config, {}, str(tmp_path))
    for step in range(2500):
        tracker.log(step, {"loss": float(step)})
    tracker.flush()
    assert tracker.history("loss")[0] == list(range(2500))


class _Away:
    """A server that takes nothing until `back` is set, then what the real one takes."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.back = False

    def log_batch(self, *args: Any, **kwargs: Any) -> None:
        if not self.back:
            raise MlflowException("the server is away")
        self._real.log_batch(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_metrics_are_kept_while_the_server_is_away(sqlite: str, tmp_path: Path) -> None:
    config = experiment()
    tracker = open_run(sqlite, f"nev-{tmp_path.name}", config.name, config, {}, str(tmp_path))
    away = _Away(tracker._client)
    tracker._client = away
    tracker.log(1, {"loss": 1.0})
    with pytest.raises(MlflowException):
        tracker.flush()
    tracker.log(2, {"loss": 0.5})
    away.back = True
    tracker.flush()
    assert Tracker(sqlite, tracker.run_id).history("loss") == ([1, 2], [1.0, 0.5])


def test_a_run_that_goes_on_gets_what_mlflow_has_missed(sqlite: str, tmp_path: Path) -> None:
    from nev.runs.metrics_log import MetricPoint, load_mlflow_run_id, read_points, save_mlflow_run_id, write_points

    config, run = experiment(), str(tmp_path / "run")
    assert load_mlflow_run_id(run) is None
    assert read_points(run, 100) == []
    first = open_run(sqlite, f"nev-{tmp_path.name}", config.name, config, {}, str(tmp_path))
    save_mlflow_run_id(run, first.run_id)
    first.log(1, {"loss": 3.0})
    first.flush()  # and the driver dies with steps 2 to 4 unsent; 5 comes after the last checkpoint
    write_points(run, 2, [MetricPoint(1, 10, {"loss": 3.0}), MetricPoint(2, 20, {"loss": 2.0, "top1": 0.5})])
    write_points(run, 4, [MetricPoint(3, 30, {"loss": 1.5}), MetricPoint(4, 40, {"loss": 1.0})])
    write_points(run, 6, [MetricPoint(5, 50, {"loss": 99.0})])  # of an attempt whose checkpoint is damaged

    again = open_run(sqlite, "x", config.name, config, {}, str(tmp_path), run_id=load_mlflow_run_id(run))
    for point in read_points(run, 4):
        again.log(point.step, point.metrics, point.time)
    again.log(5, {"loss": 0.5})
    again.flush()
    assert again.run_id == first.run_id
    assert again.history("loss") == ([1, 2, 3, 4, 5], [3.0, 2.0, 1.5, 1.0, 0.5])
    assert again.history("top1") == ([2], [0.5])


def test_a_server_that_stays_away_at_the_end_is_no_traceback(
    sqlite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nev.runs.tracking.PATIENCE_S", 0.5)
    config = experiment()
    tracker = open_run(sqlite, f"nev-{tmp_path.name}", config.name, config, {}, str(tmp_path))
    tracker._client = _Away(tracker._client)
    tracker.log(1, {"loss": 1.0})
    assert not tracker.finish("FINISHED")
    tracker._client.back = True
    assert tracker.finish("FINISHED")
    assert Tracker(sqlite, tracker.run_id).history("loss") == ([1], [1.0])
