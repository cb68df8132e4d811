"""The rows that could not be used: counted, and written to `<run>/quarantine/*.parquet` (step, uid, shard, reason)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nev.config import Experiment
from nev.data.block import Block
from nev.data.storage import filesystem, join, make_folder
from nev.errors import NevError


class TooManyBadRows(NevError, RuntimeError):
    """More rows than `data.max_bad_share` could not be used. The message names the worst shards."""


class Quarantine:
    """One rank's table of bad rows. `by_shard` and `by_reason` count those met since this process started."""

    def __init__(self, run: str, shards: tuple[str, ...], rank: int) -> None:
        self.folder = join(run, "quarantine")
        self.by_shard: Counter[str] = Counter()
        self.by_reason: Counter[str] = Counter()
        self._shards = shards
        self._rank = rank
        self._rows: list[dict[str, str | int]] = []

    def note(self, step: int, blocks: list[Block]) -> None:
        """Keep the invalid rows of a step's blocks."""
        for block in blocks:
            for row in (~block["valid"]).nonzero()[0]:
                shard, reason = self._shards[int(block["shard"][row])], str(block["reason"][row])
                self._rows.append({"step": step, "uid": str(block["uid"][row]), "shard": shard, "reason": reason})
                self.by_shard[shard] += 1
                self.by_reason[reason.split(":")[0]] += 1

    def flush(self, done: int) -> None:
        """Write what was kept since the last flush, named by step and rank, so that a repeated step overwrites itself."""
        if not self._rows:
            return
        fs, path = filesystem(join(self.folder, f"step-{done:08d}-rank-{self._rank}.parquet"))
        make_folder(fs, path.rsplit("/", 1)[0])
        with fs.open(path, "wb") as sink:
            pq.write_table(pa.Table.from_pylist(self._rows), sink)
        self._rows = []


def describe(quarantine: Quarantine, bad_rows: int, done: int, config: Experiment) -> str:
    """The error past `data.max_bad_share`, the same on every rank: they all call it together, at the same step."""
    import torch.distributed as dist

    counts: list[Any] = [None]
    if dist.is_initialized() and dist.get_world_size() > 1:
        counts = [None] * dist.get_world_size()
        dist.all_gather_object(counts, (quarantine.by_shard, quarantine.by_reason))
    else:
        counts = [(quarantine.by_shard, quarantine.by_reason)]
    shards: Counter[str] = sum((part[0] for part in counts), Counter())
    reasons: Counter[str] = sum((part[1] for part in counts), Counter())
    quarantine.flush(done)
    worst = ", ".join(f"{name} ({count})" for name, count in shards.most_common(5))
    why = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
    return (
        f"{bad_rows} of {done * config.train.global_batch} rows could not be used, more than "
        f"data.max_bad_share = {config.data.max_bad_share}. Worst shards: {worst}. Reasons: {why}. "
        f"The rows are listed in {quarantine.folder}. Mend or drop those shards, or raise data.max_bad_share."
    )
