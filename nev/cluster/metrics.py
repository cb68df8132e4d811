"""What nev exports to Ray's metrics: every name with its tags, unit and meaning, and the instruments that record them.

Ray adds the prefix `ray_`, to a counter the suffix `_total`, and labels of its own (session, node, worker id). What Ray itself
exports (CPUs, GPUs, object store, rows of Ray Data) is not exported again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple


class Exported(NamedTuple):
    """A metric. name: without Ray's prefix and suffix. tags: keys. unit: of the value. meaning: for a reader of the dashboard."""

    name: str
    kind: Literal["counter", "gauge"]
    tags: tuple[str, ...]
    unit: str
    meaning: str

    @property
    def series(self) -> str:
        """The name in Prometheus."""
        return f"ray_{self.name}{'_total' if self.kind == 'counter' else ''}"


RUN, RANK = ("run",), ("run", "rank")
IMAGES = Exported("nev_images", "counter", RANK, "images", "Images that a rank has trained on.")
STEPS = Exported("nev_steps", "counter", RANK, "steps", "Steps that a rank has done, repeated steps included.")
PHASE_SECONDS = Exported(
    "nev_phase_seconds",
    "counter",
    (*RANK, "phase"),
    "seconds",
    "Time of a rank in a phase: data (waits for a block), compute (all else of a step), validation, checkpoint, profile.",
)
MFU = Exported(
    "nev_mfu",
    "gauge",
    RANK,
    "share",
    "FLOPs of the trained layers' forward and backward, over the peak of the rank's GPU (dense bf16), since the last log.",
)
BAD_ROWS = Exported("nev_bad_rows", "gauge", RUN, "rows", "Rows that could not be used since the run's first step.")
STEP = Exported("nev_step", "gauge", RUN, "steps", "The newest step that was logged.")
RESTARTS = Exported(
    *("nev_restarts", "gauge", RUN, "restarts"),
    "Starts of the workers after the command's first: failures, preemptions, resizes.",
)
GOODPUT = Exported(
    "nev_goodput", "gauge", RUN, "share", "Steps kept over steps done, since the command's start, by the logged steps."
)
CHECKPOINT_TIME = Exported(
    "nev_checkpoint_timestamp_seconds",
    "gauge",
    RUN,
    "UNIX seconds",
    "Time of the newest checkpoint; before the first checkpoint of a run, the start of the command.",
)
COST = Exported(
    "nev_cost_usd",
    "gauge",
    RUN,
    "USD",
    "Price of the cluster's nodes since the command's start. NaN where tracking.prices has not known a node.",
)
S3_BYTES = Exported("nev_s3_read_bytes", "counter", RUN, "bytes", "Bytes that the decoding tasks have read from S3.")

EXPORTED = (
    *(IMAGES, STEPS, PHASE_SECONDS, MFU, BAD_ROWS, STEP),
    *(RESTARTS, GOODPUT, CHECKPOINT_TIME, COST, S3_BYTES),
)


class Instruments:
    """Records metrics of this process in Ray, whose own thread sends them. A record takes some two microseconds.

    tags: their values, for all metrics of this process.
    """

    def __init__(self, tags: Mapping[str, str]) -> None:
        self._tags = dict(tags)
        self._made: dict[str, Any] = {}

    def add(self, metric: Exported, value: float, **tags: str) -> None:
        """Add to a counter. tags: beside those of the process. Ray refuses 0, which is left out."""
        if value > 0:
            self._instrument(metric).inc(value, tags or None)

    def set(self, metric: Exported, value: float) -> None:
        """Set a gauge."""
        self._instrument(metric).set(value)

    def _instrument(self, metric: Exported) -> Any:
        if metric.name not in self._made:
            from ray.util.metrics import Counter, Gauge

            kind = Counter if metric.kind == "counter" else Gauge
            made = kind(metric.name, f"{metric.meaning} Unit: {metric.unit}.", metric.tags)
            made.set_default_tags({key: value for key, value in self._tags.items() if key in metric.tags})
            self._made[metric.name] = made
        return self._made[metric.name]
