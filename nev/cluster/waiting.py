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


def wait_for_room(
    bundles: Sequence[dict[str, float]],
    tell: Callable[[str], None],
    warn: Callable[[str], None],
    stop_requested: Callable[[], bool],
    remedy: str,
) -> bool:
    """Wait until the connected cluster has room for all `bundles` at a time. Returns False where a stop ended the wait.

    bundles: resources, each on a node.
    tell: called every second with what is waited for. warn: called once if no node type has the room; the wait goes on, as
        another run may end, and nodes may be added. remedy: what else may help, for that warning.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group(list(bundles))
    begin, warned = time.time(), False
    try:
        while not group.wait(POLL_S):
            if stop_requested():
                return False
            waited = time.time() - begin
            if waited < QUIET_S:
                continue
            requests = read_node_requests(group.id.hex())
            text = describe_wait(bundles, begin, requests)
            tell(text)
            reason = why_impossible(bundles, requests) if waited > DOUBT_S and not warned else ""
            if reason:
                warned = True
                warn(
                    f"{text}. {reason}: {remedy}, add such nodes, or wait for other jobs (`ray status` on the head shows both)"
                )
        return True
    finally:
        remove_placement_group(group)


def why_impossible(bundles: Sequence[dict[str, float]], requests: NodeRequests) -> str:
    """Why no wait brings the room for all `bundles`; "" where one may."""
    if requests.impossible:
        return "No node type of this cluster has, or may still start, nodes with that room"
    if not (requests.autoscaler or could_fit(bundles, list_totals())):
        return "The nodes of this cluster have no such room, and no autoscaler of version 2 starts others"
    return ""


def could_fit(bundles: Sequence[dict[str, float]], nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether `nodes` would have room for `bundles` if nothing else ran, as far as sums and single bundles say."""
    needed: Counter[str] = Counter()
    for bundle in bundles:
        needed.update(bundle)
    there: Counter[str] = Counter()
    for node in nodes:
        there.update(node)
    alone = all(any(fits(bundle, node) for node in nodes) for bundle in bundles)
    return alone and fits(needed, there)


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
