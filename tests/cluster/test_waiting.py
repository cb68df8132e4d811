"""What a wait for room says, and when it says that no wait brings the room."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nev.cluster import waiting
from nev.cluster.ray_internals import NodeRequests
from nev.cluster.waiting import could_fit, describe_wait, why_impossible

NOTHING = NodeRequests({}, {}, impossible=False, autoscaler=True)
Amounts = dict[str, float]
amounts: st.SearchStrategy[Amounts] = st.fixed_dictionaries({"CPU": st.integers(0, 4), "GPU": st.integers(0, 2)})


def has_place(bundles: list[Amounts], nodes: list[Amounts]) -> bool:
    """Whether some assignment of bundles to nodes fits. All are tried."""
    for places in product(range(len(nodes)), repeat=len(bundles)):
        left = [dict(node) for node in nodes]
        for bundle, place in zip(bundles, places, strict=True):
            for name, amount in bundle.items():
                left[place][name] -= amount
        if all(amount >= 0 for node in left for amount in node.values()):
            return True
    return False


@given(st.lists(amounts, max_size=4), st.lists(amounts, min_size=1, max_size=3))
def test_what_has_a_place_is_never_called_impossible(bundles: list[Amounts], nodes: list[Amounts]) -> None:
    assert could_fit(bundles, nodes) or not has_place(bundles, nodes)


def test_bundles_that_no_node_or_not_all_nodes_hold_are_impossible() -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 4.0, "GPU": 1.0}]
    assert could_fit([{"CPU": 4.0}, {"CPU": 3.0, "GPU": 1.0}], nodes)
    assert not could_fit([{"CPU": 5.0}], nodes)
    assert not could_fit([{"GPU": 1.0}, {"GPU": 1.0}], nodes)
    assert not could_fit([{"memory": 1.0}], nodes)


def test_an_autoscaler_may_bring_what_the_nodes_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "list_totals", lambda: [{"CPU": 2.0}])
    gpu = [{"GPU": 1.0}]
    late = waiting.LONE_DOUBT_S + 1
    assert why_impossible(gpu, NOTHING, late) == ""
    none_fits = NOTHING._replace(impossible=True)
    assert why_impossible(gpu, none_fits, waiting.DOUBT_S + 1).startswith("No node type of this cluster has")
    assert why_impossible(gpu, none_fits, waiting.DOUBT_S - 1) == "", "the autoscaler may not know all nodes yet"
    alone = NOTHING._replace(autoscaler=False)
    assert why_impossible(gpu, alone, late).startswith("The nodes of this cluster have no such room, and no autoscaler")
    assert why_impossible(gpu, alone, waiting.DOUBT_S + 1) == "", "an autoscaler of version 1 may start nodes"
    assert why_impossible([{"CPU": 2.0}], alone, late) == "", "another job may end"


def test_the_line_of_a_wait() -> None:
    requests = NOTHING._replace(coming={"gpu": 2}, failed={"spot": "no capacity\nmore"})
    text = describe_wait([{"GPU": 1.0}, {"GPU": 1.0}, {"CPU": 1.0, "memory": 2.0**31}], 0.0, requests)
    assert text[len("waiting since 00:00:00") :] == (
        " for room: 2 x (1 GPU), 1 x (1 CPU, 2.0 GiB); starting: 2 gpu; spot did not start: no capacity"
    )
