"""A cluster that grows and shrinks, by Ray's autoscaler and nodes that are processes of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from benchmarks.contestants.local_nodes import DECODER, Cloud, autoscaling_cloud, end_node
from benchmarks.contestants.processes import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TRAINER = {
    "resources": {"CPU": 1, "memory": 3 * 2**30},
    "node_config": {"boot_s": 8},
    "min_workers": 0,
    "max_workers": 1,
}
IDLE_S = 10


@pytest.fixture(scope="module")
def cloud() -> Iterator[Cloud]:
    with autoscaling_cloud({"decoder": DECODER, "trainer": TRAINER}, idle_s=IDLE_S) as started:
        yield started


def test_decoders_come_and_go_with_the_pace_of_the_consumer(cloud: Cloud, tmp_path: Path) -> None:
    """A block takes a second of a CPU, and a little more of Ray: 1.8 blocks per second need 2 CPUs, 0.6 need 1."""
    pace, output, errors = tmp_path / "pace", tmp_path / "steps", tmp_path / "errors"
    pace.write_text("1.8")
    command = [sys.executable, "-m", "benchmarks.contestants.paced_stream", "1", str(pace)]
    with output.open("w") as steps, errors.open("w") as problems:
        driver = subprocess.Popen(command, env=cloud.env, stdout=steps, stderr=problems)

    def decoders() -> int:
        assert driver.poll() is None, errors.read_text()
        return len(cloud.alive())

    try:
        wait_for(lambda: decoders() >= 2, 180, "a second decoder")
        lost = next(iter(cloud.alive()))
        taken = len(output.read_text().splitlines())
        wait_for(lambda: len(output.read_text().splitlines()) > taken + 8, 120, "steps with both")
        end_node(lost)  # a spot machine, without notice
        wait_for(lambda: decoders() >= 2 and lost not in cloud.alive(), 120, "a decoder in its place")
        pace.write_text("0.6")
        wait_for(lambda: decoders() == 1, 180, "a decoder that goes while the stream runs")
        taken = len(output.read_text().splitlines())
        wait_for(lambda: len(output.read_text().splitlines()) > taken + 1, 60, "steps with the decoder that is left")
    finally:
        pace.write_text("0")
        driver.wait(60)
    assert driver.returncode == 0, errors.read_text()
    steps_taken = [json.loads(line) for line in output.read_text().splitlines()]
    numbers = list(chain.from_iterable(step["blocks"] for step in steps_taken))
    assert numbers == list(range(len(numbers))), "every block once, in order, though a node died"
    assert all(node.startswith("decoder") for step in steps_taken for node in step["nodes"])
    wait_for(lambda: not cloud.alive(), 120, "the last decoder goes when the stream has ended")


WAIT = """
import sys, time
from nev.cluster.session import connect
from nev.cluster.waiting import wait_for_room
connect()
begin, warned = time.monotonic(), []
def warn(text):
    warned.append(text)
    print(time.monotonic() - begin, text)
print(wait_for_room([[{"GPU": 1.0}, {"CPU": 1.0}]], print, warn, lambda: bool(warned), "ask for less"))
"""


def test_room_that_no_node_type_has_is_named(cloud: Cloud) -> None:
    done = subprocess.run([sys.executable, "-c", WAIT], env=cloud.env, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0].startswith("waiting since ")
    assert "for room: 1 x (1 GPU), 1 x (1 CPU)" in lines[0]
    seconds, _, text = lines[-2].partition(" ")
    assert (
        "No node type of this cluster has, or may still start, nodes with that room: ask for less, add such nodes"
        in text
    )
    assert float(seconds) < 10
    assert lines[-1] == "False", "a stop ends the wait"


COME = """
from nev.cluster.session import connect
from nev.cluster.waiting import wait_for_room
connect()
print(wait_for_room([[{"CPU": 1.0, "memory": 2.0 * 2**30}, {"CPU": 1.0}]], print, print, lambda: False, "ask for less"))
"""


def test_room_that_nodes_bring_is_waited_for(cloud: Cloud) -> None:
    before = len(cloud.launched())
    done = subprocess.run([sys.executable, "-c", COME], env=cloud.env, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert any("for room: 1 x (1 CPU, 2.0 GiB), 1 x (1 CPU); starting: 1 decoder, 1 trainer" in line for line in lines)
    assert lines[-1] == "True"
    assert sorted(cloud.launched()[before:]) == ["decoder", "trainer"], "the request is steady"
    wait_for(lambda: not cloud.alive(), 120, "nodes go when nobody needs them")
