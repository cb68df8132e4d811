"""Prometheus metrics of one application. Each application has a registry of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Meters:
    """The metrics. `make_meters` makes them."""

    registry: CollectorRegistry = field(repr=False)
    requests: Counter
    seconds: Histogram
    batch_size: Histogram
    forward_seconds: Histogram
    waiting: Gauge
    items: Counter
    dropped: Counter
    rejected: Counter
    failed: Counter


def make_meters() -> Meters:
    """Metrics at zero, in a new registry, with those of the process: memory, CPU seconds, open files."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    kind = ("kind",)
    return Meters(
        registry=registry,
        requests=Counter("nev_requests", "Answered requests.", ("route", "method", "status"), registry=registry),
        seconds=Histogram(
            "nev_request_seconds",
            "Seconds from a request's head to its answer.",
            ("route",),
            buckets=SECONDS,
            registry=registry,
        ),
        batch_size=Histogram("nev_batch_size", "Items of a forward.", kind, buckets=SIZES, registry=registry),
        forward_seconds=Histogram(
            "nev_forward_seconds", "Seconds of a forward.", kind, buckets=SECONDS, registry=registry
        ),
        waiting=Gauge("nev_waiting_items", "Items that are accepted and not answered.", kind, registry=registry),
        items=Counter("nev_items", "Items that were embedded.", kind, registry=registry),
        dropped=Counter(
            "nev_dropped_items", "Items dropped before the forward: the caller had gone.", kind, registry=registry
        ),
        rejected=Counter("nev_rejected_requests", "Requests answered with 429.", ("reason",), registry=registry),
        failed=Counter("nev_failed_items", "Items for which the model failed.", kind, registry=registry),
    )
