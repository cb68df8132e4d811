"""Ray starts beside the driver's work, and its first processes have imported what the tasks of a stream need."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from benchmarks.contestants.processes import wait_for
from nev.cluster import warm_up
from nev.config.experiment import Experiment
from nev.config.file import to_yaml

ROOT = Path(__file__).parents[2]

# The task of an actor in Ray Train's environment, as the tasks of a stream are: it says what its process had imported before.
SCRIPT = """
import sys, time
from nev.cluster.warm_up import connecting

with connecting():
    pass
import ray
from nev.cluster.ray_internals import controller_environment

@ray.remote(num_cpus=1)
def imported():
    return [name for name in ("torch", "nev.data.stream") if name in sys.modules]

@ray.remote(num_cpus=0)
class Controller:
    def run(self):
        return ray.get(imported.remote())

controller = Controller.options(runtime_env={"env_vars": controller_environment()}).remote()
limit = time.monotonic() + 60
while (found := ray.get(controller.run.remote())) != ["torch", "nev.data.stream"] and time.monotonic() < limit:
    time.sleep(0.5)
print(found, sorted(actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)))
"""


def outside_of_ray(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")} | more


@pytest.mark.ray
def test_the_tasks_of_a_stream_find_their_imports() -> None:
    env = outside_of_ray(RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="1")  # which Ray Train hands on
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=120)
    assert run.stdout.splitlines()[-1:] == [
        "['torch', 'nev.data.stream'] ['AutoscalingCoordinator', 'datasets_stats_actor']"
    ], run.stdout + run.stderr


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    for name in ("start_task_processes", "start_actors"):
        monkeypatch.setattr(warm_up, name, lambda: None)
    return monkeypatch


def test_an_error_of_the_start_is_raised_once(no_ray: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def connect() -> None:
        tries.append(1)
        raise ConnectionError("no cluster there")

    no_ray.setattr(warm_up, "connect", connect)
    with pytest.raises(ConnectionError, match="no cluster there"), warm_up.connecting():
        assert threading.current_thread() is threading.main_thread()
    assert len(tries) == 1


@pytest.fixture
def over(no_ray: pytest.MonkeyPatch) -> list[int]:
    """Grows when a start of Ray, which takes a second, is over."""
    starts: list[int] = []

    def connect() -> None:
        time.sleep(1)
        starts.append(1)

    no_ray.setattr(warm_up, "connect", connect)
    return starts


def test_an_error_of_the_body_waits_for_the_start(over: list[int]) -> None:
    with pytest.raises(ValueError, match="no such set"), warm_up.connecting():
        raise ValueError("no such set")
    assert over, "this process ends while Ray starts"


def test_ctrl_c_while_all_wait_for_the_start_waits_for_it(over: list[int]) -> None:
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), warm_up.connecting():
        pass
    assert over, "this process ends while Ray starts"


def test_a_connected_process_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    for name in ("connect", "start_task_processes", "start_actors"):
        monkeypatch.setattr(warm_up, name, lambda: pytest.fail("started"))
    before = threading.active_count()
    with warm_up.connecting():
        assert threading.active_count() == before


def names_of_run(mark: str) -> list[str]:
    """The names of the processes that have the mark in their environment."""
    names = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("NEV_TEST_MARK") == mark:
                names.append(process.name())
    return names


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "message"),
    [(signal.SIGTERM, 143, "stopped by SIGTERM"), (signal.SIGINT, 130, "interrupted."), (None, 2, "error: ")],
)
def test_a_run_that_ends_while_ray_starts_leaves_no_process(
    number: signal.Signals | None, status: int, message: str, tiny: Callable[..., Experiment], tmp_path: Path
) -> None:
    config = tiny(eval__best="top-2") if number is None else tiny()
    (tmp_path / "tiny.yaml").write_text(to_yaml(config))
    mark = uuid.uuid4().hex
    command = [sys.executable, str(ROOT / "pipelines/train.py"), "--config", "tiny.yaml"]
    run = subprocess.Popen(
        command, cwd=tmp_path, env=outside_of_ray(NEV_TEST_MARK=mark), stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: "gcs_server" in names_of_run(mark), 60, "a Ray that starts while the driver checks")
        if number:
            run.send_signal(number)
        errors = run.communicate(timeout=60)[1]
    finally:
        run.kill()
    assert run.returncode == status, errors
    assert message in errors
    assert "Traceback" not in errors
    wait_for(lambda: not names_of_run(mark), 20, "the end of all processes")
