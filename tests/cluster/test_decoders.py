"""Nodes that decode come and go with the need of a stream: how many, and on which clusters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.data import DataContext

from nev.cluster.backpressure import stream_context
from nev.cluster.decoders import LABEL, AskForNeed, Measured, decide_cpus, place_decoding

START = Measured(0.0, 0, 0, 0.0, 0, 0.0)


def measured(
    seconds: float = 5.0, consumed: int = 0, tasks: int = 10, task_s: float = 5.0, active: int = 0, ready: float = 0.5
) -> Measured:
    return Measured(seconds, consumed, tasks, task_s, active, ready)


def test_scarce_blocks_double_the_cpus_that_all_decode() -> None:
    assert decide_cpus(4, START, measured(active=4, ready=0.0)) == 8
    assert decide_cpus(4, START, measured(active=3, ready=0.0)) == 4, "a node is yet to come"
    assert decide_cpus(4, START, measured(tasks=0, task_s=0.0, active=4, ready=0.0)) == 4, (
        "the first blocks are yet to come"
    )
    assert decide_cpus(4, START, measured(active=4, ready=0.5)) == 4


def test_plenty_of_blocks_leave_the_cpus_that_the_pace_takes() -> None:
    # 40 blocks in 5 s, half a second of a CPU each: 4 CPUs.
    assert decide_cpus(16, START, measured(consumed=40, ready=1.0)) == 4
    assert decide_cpus(16, START, measured(consumed=41, ready=1.0)) == 5, "rounded up"
    assert decide_cpus(16, START, measured(consumed=0, ready=1.0)) == 1, "consumers that wait need one"
    assert decide_cpus(2, START, measured(consumed=40, ready=1.0)) == 2, "plenty of blocks are no reason for more"
    assert decide_cpus(16, START, measured(tasks=0, task_s=0.0, ready=1.0)) == 16


@given(st.floats(0.5, 200), st.floats(0.01, 5))
def test_the_cpus_settle_between_the_need_and_one_more(pace: float, block_s: float) -> None:
    """A consumer of a fixed pace, and decoders that do what they can: from one CPU up, and never more than need and one."""
    need, cpus, ready, before = pace * block_s, 1, 0.0, START
    for turn in range(1, 60):
        made = min(cpus / block_s, pace if ready >= 1 else cpus / block_s)
        ready = min(1.0, max(0.0, ready + (made - pace) * 5 / 100))
        consumed = before.consumed + round(5 * min(pace, made if ready == 0 else pace))
        tasks = before.tasks + max(1, round(5 * made))
        now = Measured(5.0 * turn, consumed, tasks, tasks * block_s, cpus if ready < 1 else 0, ready)
        cpus, before = decide_cpus(cpus, before, now), now
    assert need / 2 <= cpus <= max(2 * need, 2)


def test_one_machine_decodes_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("NEV_CLUSTER", raising=False)
    context = stream_context(4, 2**20)
    assert place_decoding(context) == {}
    assert AskForNeed not in context.custom_execution_callback_classes


def test_a_cluster_without_decoders_decodes_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": False, "Labels": LABEL}, {"Alive": True, "Labels": {"nev.io/role": "trainer"}}]
    monkeypatch.setattr("nev.cluster.decoders.ray.nodes", lambda: nodes)
    monkeypatch.setenv("NEV_CLUSTER", "1")
    assert place_decoding(stream_context(4, 2**20)) == {}
    nodes.append({"Alive": True, "Labels": {**LABEL, "zone": "a"}})
    assert place_decoding(stream_context(4, 2**20))["label_selector"] == LABEL


def test_a_cluster_with_decoders_decodes_there_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEV_CLUSTER", "1")
    monkeypatch.setenv("NEV_DECODERS", "1")
    context: DataContext = stream_context(4, 2**20)
    placement = place_decoding(context)
    assert placement["label_selector"] == LABEL
    assert placement["fallback_strategy"] == [{"label_selector": {"nev.io/role": "!decoder"}}]
    assert AskForNeed in context.custom_execution_callback_classes
