"""Ray starts beside the driver's work, and its first processes have imported what the tasks of a stream need."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# The task of an actor in Ray Train's environment, as the tasks of a stream are: it says what its process had imported before.
SCRIPT = """
import sys, time
from nev.cluster.session import connect
from nev.cluster.warm_up import begin_to_connect

begin_to_connect()
connect()
import ray
from ray.train.v2._internal.constants import get_env_vars_to_propagate

@ray.remote(num_cpus=1)
def imported():
    return [name for name in ("torch", "nev.data.stream") if name in sys.modules]

@ray.remote(num_cpus=0)
class Controller:
    def run(self):
        return ray.get(imported.remote())

environment = get_env_vars_to_propagate() | {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"}
controller = Controller.options(runtime_env={"env_vars": environment}).remote()
limit = time.monotonic() + 60
while (found := ray.get(controller.run.remote())) != ["torch", "nev.data.stream"] and time.monotonic() < limit:
    time.sleep(0.5)
print(found, sorted(actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)))
"""


@pytest.mark.ray
def test_the_tasks_of_a_stream_find_their_imports() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.stdout.splitlines()[-1:] == [
        "['torch', 'nev.data.stream'] ['AutoscalingCoordinator', 'datasets_stats_actor']"
    ], run.stdout + run.stderr


@pytest.mark.ray
def test_a_connected_process_starts_nothing(ray_cluster: None) -> None:
    import threading

    from nev.cluster.warm_up import begin_to_connect

    before = threading.active_count()
    begin_to_connect()
    assert threading.active_count() == before
