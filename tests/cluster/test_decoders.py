"""Nodes that decode come and go with the need of a stream: how many, and on which clusters."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.data import DataContext

from nev.cluster.backpressure import stream_context
from nev.cluster.decoders import LABEL, AskForNeed, Share, Window, choose_node, decide_cpus, first_cpus, place_decoding

STEP_BLOCKS = 4


def decide(cpus: int, window: Window, there: int = 1000, elsewhere: int = 0) -> int | None:
    return decide_cpus(cpus, Share({"a": there}, elsewhere), STEP_BLOCKS * 0.5, window)


def test_scarce_blocks_double_the_cpus_that_all_decode() -> None:
    scarce = Window(seconds=20.0, consumed=10, decoded=10, active=4.0, ready=0.0)
    assert decide(4, scarce, there=4) == 8
    assert decide(4, scarce, there=32) == 32, "what is there is used"
    assert decide(1, scarce, there=1, elsewhere=3) == 5, "8 in all, 3 of them elsewhere"
    assert decide(4, scarce, there=3) is None, "a node is yet to come"
    assert decide(4, scarce._replace(decoded=3), there=4) is None, "a process is yet to start"
    assert decide(4, scarce._replace(active=3.0), there=4) is None, "a CPU has nothing to do"
    assert decide(4, scarce._replace(consumed=8), there=4) is None, "a lookahead that fills"
    assert decide(4, scarce._replace(ready=0.5), there=4) is None
    assert decide(4, scarce._replace(seconds=19.0), there=4) is None
    booting = scarce._replace(seconds=300.0, active=2.0, ends=(1.0, 2.0, 3.0))
    assert decide(4, booting, there=2) == 4, "what was asked for stays asked for while nodes boot"
    assert decide(8, scarce._replace(active=8.0, ends=(1.0, 2.0, 3.0)), there=0) is None, "another run has all decoders"


def test_cpus_that_have_nothing_to_do_are_given_back() -> None:
    # A step of 4 blocks takes 2 s of a CPU, and two steps are taken in a second: 4 CPUs.
    plenty = Window(seconds=10.0, consumed=80, decoded=80, active=4.0, ready=0.9, ends=(0.5, 1.0, 1.5, 2.0))
    assert decide(8, plenty) == 5
    assert decide(5, plenty) == 5
    assert decide(4, plenty) == 4, "plenty of blocks are no reason for more"
    assert decide(8, plenty, elsewhere=1) == 4, "CPUs elsewhere take their part"
    assert decide(2, plenty, elsewhere=100) == 1
    assert decide(16, plenty) == 8, "half at a time: an evaluation may lie in the window"
    assert decide(64, plenty._replace(ends=(1.0, 1.05, 1.1))) == 41, "one more than the need"
    assert decide(2, plenty._replace(decoded=0, active=0.0, ends=(1.0, 4.0, 8.0))) == 1
    assert decide(8, plenty._replace(ends=(0.5, 1.0))) is None, "one whole step"
    assert decide(8, plenty._replace(ends=(), consumed=0, seconds=3600.0)) is None, "an evaluation of an hour"


@settings(max_examples=40, deadline=None)
@given(st.floats(0.1, 20), st.integers(1, 40), st.floats(0.2, 5))
def test_the_cpus_settle_at_the_need_or_one_more(need: float, begin: int, step_s: float) -> None:
    """A consumer takes the blocks of a step at a time; a CPU decodes a block in `block_s`; nodes go when they are not needed."""
    block_s, turn_s = need * step_s / STEP_BLOCKS, step_s / 10
    cpus, window, ready, waiting, made, late = begin, Window(), 0.0, 0.0, 0.0, []
    turns = int(400 / turn_s) + 400
    for turn in range(turns):
        limit = max(2.0 * STEP_BLOCKS, 4.0 * cpus)
        active = min(float(cpus), max(0.0, limit - ready))
        ready += active * turn_s / block_s
        waiting += turn_s
        taken = STEP_BLOCKS if waiting >= 0.999 * step_s and ready >= STEP_BLOCKS else 0
        ready, waiting = (ready - taken, 0.0) if taken else (ready, waiting)
        before, made = math.floor(made), made + active * turn_s / block_s
        window = window.add(turn_s, taken, math.floor(made) - before, active, min(1.0, ready / limit), taken > 0)
        decided = decide_cpus(cpus, Share({"a": cpus}, 0), STEP_BLOCKS * block_s, window)
        if decided is not None:
            cpus, window = decided, Window()
        if turn > turns / 2:
            late.append(waiting)
    assert need <= cpus + 1e-6
    assert cpus <= math.ceil(need + 1e-6) + 1
    assert max(late) <= 1.5 * step_s, "the consumer waits"


def test_a_task_goes_to_the_first_decoder_with_a_free_cpu() -> None:
    decoders = {"old": 2, "new": 1}
    assert choose_node(decoders, {}) == "old"
    assert choose_node(decoders, {"old": 1}) == "old"
    assert choose_node(decoders, {"old": 2}) == "new"
    assert choose_node(decoders, {"old": 2, "new": 1}) is None
    assert choose_node({}, {"gone": 1}) is None


@pytest.mark.parametrize(("streams", "cpus"), [(1, 8), (2, 4), (3, 3), (16, 1)])
def test_the_first_stream_leaves_decoders_for_the_others(streams: int, cpus: int) -> None:
    assert first_cpus(Share({"a": 4, "b": 4}, 2), streams) == cpus


def test_one_machine_decodes_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("NEV_CLUSTER", raising=False)
    context = stream_context(4, 2**20)
    assert place_decoding(context, STEP_BLOCKS) == {}
    assert AskForNeed not in context.custom_execution_callback_classes


def test_a_cluster_without_decoders_decodes_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"NodeID": "a", "Alive": False, "Labels": LABEL, "Resources": {"CPU": 4.0}},
        {"NodeID": "b", "Alive": True, "Labels": {"nev.io/role": "trainer"}, "Resources": {"CPU": 4.0}},
    ]
    monkeypatch.setattr("nev.cluster.decoders.ray.nodes", lambda: nodes)
    monkeypatch.setenv("NEV_CLUSTER", "1")
    assert place_decoding(stream_context(4, 2**20), STEP_BLOCKS) == {}
    nodes.append({"NodeID": "c", "Alive": True, "Labels": {**LABEL, "zone": "a"}, "Resources": {"CPU": 4.0}})
    assert place_decoding(stream_context(4, 2**20), STEP_BLOCKS)["label_selector"] == LABEL


def test_a_cluster_with_decoders_decodes_there_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEV_CLUSTER", "1")
    monkeypatch.setenv("NEV_DECODERS", "1")
    context: DataContext = stream_context(4, 2**20)
    placement = place_decoding(context, STEP_BLOCKS)
    assert placement["label_selector"] == LABEL
    assert placement["fallback_strategy"] == [{"label_selector": {"nev.io/role": "!decoder"}}]
    assert AskForNeed in context.custom_execution_callback_classes
