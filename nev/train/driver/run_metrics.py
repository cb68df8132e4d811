"""What the driver exports to Ray's metrics: progress, restarts, goodput, age of the newest checkpoint, cost so far."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from nev.cluster.metrics import BAD_ROWS, CHECKPOINT_TIME, COST, GOODPUT, RESTARTS, STEP, Instruments
from nev.planner.hardware import Prices
from nev.runs.metrics_log import MetricPoint
from nev.train.messages import CheckpointSaved, Message, Metrics, Started

COST_S = 10.0  # between two looks at the nodes, which may come and go
INSTANCE_TYPE, MARKET_TYPE = "nev.io/instance-type", "ray.io/market-type"  # labels of a node


class RunMetrics:
    """Exports the numbers of a run, from the workers' messages.

    start_step: from which this command trains.
    saved_at: UNIX time of the checkpoint of `start_step`; of a new run, the present.
    """

    def __init__(self, instruments: Instruments, start_step: int, saved_at: float) -> None:
        self._instruments = instruments
        self._start = self._step = start_step
        self._done = 0
        self._starts = 0
        instruments.set(STEP, start_step)
        instruments.set(RESTARTS, 0)
        instruments.set(CHECKPOINT_TIME, saved_at)

    def observe(self, message: Message) -> None:
        """Export what a message says."""
        match message:
            case Started(step):
                self._starts += 1
                self._instruments.set(RESTARTS, self._starts - 1)
                self._move(step)
            case Metrics(step, metrics):
                self._done += step - self._step
                self._move(step)
                if "bad_rows" in metrics:
                    self._instruments.set(BAD_ROWS, metrics["bad_rows"])
            case CheckpointSaved():
                self._instruments.set(CHECKPOINT_TIME, time.time())

    def _move(self, step: int) -> None:
        self._step = step
        self._instruments.set(STEP, step)
        if self._done:
            self._instruments.set(GOODPUT, max(0, step - self._start) / self._done)


def checkpoint_time(points: Sequence[MetricPoint], start_step: int) -> float:
    """UNIX time of the last metrics of the checkpoint from which a run continues; the present for a new run."""
    times = [point.time for point in points if point.step == start_step]
    return max(times) / 1000 if times else time.time()


def price_nodes(labels: Sequence[Mapping[str, str]], prices: Prices) -> tuple[float, list[str]]:
    """The price of nodes in USD an hour, and why nodes are left out.

    labels: of each node. The type of a node is its label nev.io/instance-type; a node with ray.io/market-type=spot has the spot
        price.
    """
    total, unknown = 0.0, []
    for node in labels:
        name = node.get(INSTANCE_TYPE)
        spot = node.get(MARKET_TYPE) == "spot"
        price = prices.instances.get(name) if name else None
        usd = (price.spot if spot else price.on_demand) if price else None
        if usd is None:
            unknown.append(f"{name} has no {'spot ' * spot}price" if name else f"a node has no label {INSTANCE_TYPE}")
        else:
            total += usd
    return total, unknown


@contextmanager
def export_cost(
    instruments: Instruments, prices: Prices | None, warn: Callable[[str], None], period_s: float = COST_S
) -> Iterator[None]:
    """Export the cost of the cluster's nodes while the body runs, in a thread; nothing without prices.

    Where a node has no price, the cost is exported as NaN, since a number without that node would be too low.
    """
    if prices is None:
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_count, args=(instruments, prices, warn, period_s, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _count(
    instruments: Instruments, prices: Prices, warn: Callable[[str], None], period_s: float, over: threading.Event
) -> None:
    cost, last, uncounted, warned = 0.0, time.monotonic(), False, False
    while not over.wait(period_s):
        price, unknown = price_nodes(alive_labels(), prices)
        now = time.monotonic()
        cost, last = cost + price * (now - last) / 3600, now
        uncounted |= bool(unknown)
        instruments.set(COST, math.nan if uncounted else cost)
        if unknown and not warned:
            warn(f"the cost of this run is not known: {'; '.join(sorted(set(unknown)))}")
            warned = True


def alive_labels() -> list[dict[str, str]]:
    """The labels of each node that is alive."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Labels"] for node in nodes if node["Alive"]]
