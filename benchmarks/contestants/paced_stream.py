"""A stream whose blocks take a fixed time of a CPU, and a consumer that takes them at a pace: the driver for an autoscaler.

python -m benchmarks.contestants.paced_stream BLOCK_S FILE

FILE has the pace in blocks per second, read before each step; 0 ends the stream. Prints a line of JSON for each step: the time,
the pace, the numbers of its blocks, and the nodes that read them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROWS, STEP_BLOCKS = 2, 2


@dataclass(frozen=True)
class SleepingReader:
    """In the place of `nev.data.block.BlockReader`. The node that reads a block is in the block."""

    block_s: float
    row_bytes: int = 1024

    def allocate(self, rows: int) -> Any:
        """Memory for the column `image` of a block."""
        return np.zeros((rows, 16), np.float16)

    def read_blocks(self, window: Any, memory: Any) -> Iterator[dict[str, Any]]:
        """Blocks of `ROWS` rows, each after `block_s`."""
        node = os.environ.get("RAY_CLOUD_INSTANCE_ID", "head")
        for _ in range(window.blocks):
            time.sleep(self.block_s)
            yield {"valid": np.ones(ROWS, bool), "node": np.array([node] * ROWS)}


def consume(block_s: float, pace: Path) -> None:
    """Take steps of blocks from a stream on the cluster of `RAY_ADDRESS`."""
    from nev.cluster.session import connect
    from nev.data.plan import Plan
    from nev.data.stream import RoundRobinSplit, make_stream

    connect()
    plan = Plan(np.full(25_000, ROWS, np.int64), 0, ROWS * STEP_BLOCKS, ROWS)
    reader: Any = SleepingReader(block_s)
    shard = RoundRobinSplit().configure({"train": make_stream(reader, plan, 0, plan.steps_per_epoch)}, 1)[0]["train"]
    blocks = iter(shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2 * STEP_BLOCKS))
    while now := float(pace.read_text()):
        due = time.time() + STEP_BLOCKS / now
        step = [next(blocks) for _ in range(STEP_BLOCKS)]
        numbers = [int(block["block"][0]) for block in step]
        nodes = [str(block["node"][0]) for block in step]
        print(json.dumps({"time": time.time(), "pace": now, "blocks": numbers, "nodes": nodes}), flush=True)
        time.sleep(max(0.0, due - time.time()))


if __name__ == "__main__":
    consume(float(sys.argv[1]), Path(sys.argv[2]))
