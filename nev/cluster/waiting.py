"""Waiting for room on a cluster that may grow: the request stands until nodes have come, and the console says what is missing.

Ray Train (2.60) waits, too, but takes its request back every 15 s (`nev.common.quiet`) and asks anew, so that an autoscaler sees
a demand that comes and goes; and it says nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from nev.cluster.ray_internals import NodeRequests, read_node_requests

POLL_S = 1.0
QUIET_S = 3.0  # no word about a wait that is shorter
DOUBT_S = 8.0  # after which an autoscaler that says "impossible" knows all nodes
LONE_DOUBT_S = 30.0  # after which a cluster without an autoscaler of version 2 is taken for what it is


def wait_for_room(
    gangs: Sequence[Sequence[dict[str, float]]],
    tell: Callable[[str], None],
    warn: Callable[[str], None],
    stop_requested: Callable[[], bool],
    remedy: str,
) -> bool:
    """Wait until the connected cluster has room for all gangs at a time. Returns False where a stop ended the wait.

    gangs: bundles of resources, each on a node. An autoscaler starts nodes for a whole gang or for none of it.
    tell: called every second with what is waited for. warn: called once for each reason why the room may never come; the wait
        goes on, as another run may end, and nodes may be added. remedy: what else may help, for that warning.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    bundles = [bundle for gang in gangs for bundle in gang]
    groups = [placement_group(list(gang)) for gang in gangs]
    begin, reasons = time.time(), set[str]()
    try:
        while not all(group.wait(POLL_S) for group in groups):
            if stop_requested():
                return False
            waited = time.time() - begin
            if waited < QUIET_S:
                continue
            requests = read_node_requests([group.id.hex() for group in groups])
            text = describe_wait(bundles, begin, requests)
            tell(text)
            reason = why_impossible(bundles, requests, waited)
            if reason and reason not in reasons:
                reasons.add(reason)
                warn(
                    f"{text}. {reason}: {remedy}, add such nodes, or wait for other jobs (`ray status` on the head shows both)"
                )
        return True
    finally:
        for group in groups:
            remove_placement_group(group)


def why_impossible(bundles: Sequence[dict[str, float]], requests: NodeRequests, waited: float) -> str:
    """Why the cluster may never have the room for all `bundles`; "" where nothing says so. waited: in seconds."""
    if requests.impossible and waited > DOUBT_S:
        return "No node type of this cluster has, or may still start, nodes with that room"
    if not requests.autoscaler and waited > LONE_DOUBT_S and not could_fit(bundles, list_totals()):
        return "The nodes of this cluster have no such room, and no autoscaler of version 2 starts others"
    return ""


def could_fit(bundles: Sequence[dict[str, float]], nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether `nodes` would have room for `bundles` if nothing else ran, as far as sums and single bundles say."""
    needed, total = Counter[str](), Counter[str]()
    for bundle in bundles:
        needed.update(bundle)
    for node in nodes:
        total.update(node)
    return fits(needed, total) and all(any(fits(bundle, node) for node in nodes) for bundle in bundles)


def fits(bundle: Mapping[str, float], room: Mapping[str, float]) -> bool:
    """Whether `room` has what `bundle` needs of each resource."""
    return all(room.get(name, 0.0) >= amount for name, amount in bundle.items())


def list_totals() -> list[dict[str, float]]:
    """The resources of each node of the connected cluster, in use or not."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def describe_wait(bundles: Sequence[dict[str, float]], begin: float, requests: NodeRequests) -> str:
    """What is waited for, since when, and which nodes are on their way.

    begin: in seconds since the epoch.
    """
    counts = Counter(_write_bundle(bundle) for bundle in bundles)
    text = f"waiting since {time.strftime('%H:%M:%S', time.localtime(begin))} for room: "
    text += ", ".join(f"{count} x {bundle}" for bundle, count in counts.items())
    if requests.coming:
        text += "; starting: " + ", ".join(f"{count} {name}" for name, count in sorted(requests.coming.items()))
    for name, reason in sorted(requests.failed.items()):
        text += f"; {name} did not start: {reason.splitlines()[0] if reason else 'no reason given'}"
    return text


def _write_bundle(bundle: dict[str, float]) -> str:
    amounts = [
        f"{amount / 2**30:.1f} GiB" if name == "memory" else f"{amount:g} {name}" for name, amount in bundle.items()
    ]
    return "(" + ", ".join(amounts) + ")"
