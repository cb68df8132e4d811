"""Waiting for room on a cluster that may grow: the request stands until nodes have come, and the console says what is missing.

Ray Train (2.60) waits, too, but takes its request back every 15 s (`nev.common.quiet`) and asks anew, so that an autoscaler sees
a demand that comes and goes; and it says nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

from nev.cluster.ray_internals import NodeRequests, read_node_requests

POLL_S = 1.0
QUIET_S = 3.0  # no word about a wait that is shorter
DOUBT_S = 8.0  # after which an autoscaler that says "impossible" knows all nodes


def wait_for_room(
    bundles: Sequence[dict[str, float]],
    tell: Callable[[str], None],
    warn: Callable[[str], None],
    stop_requested: Callable[[], bool],
) -> bool:
    """Wait until the connected cluster has room for all `bundles` at a time. Returns False where a stop ended the wait.

    bundles: resources, each on a node.
    tell: called every second with what is waited for. warn: called once if no node type has the room; the wait goes on, as
        another run may end, and nodes may be added.
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
            if requests.impossible and waited > DOUBT_S and not warned:
                warned = True
                warn(
                    f"{text}. No node type of this cluster has, or may still start, nodes with that room: lower workers.count, "
                    "workers.cpus, workers.gpus or workers.memory, add such nodes, or wait for other jobs (`ray status` on the "
                    "head shows both)"
                )
        return True
    finally:
        remove_placement_group(group)


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
