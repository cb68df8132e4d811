"""The rows that could not be used: counted by reason, and written to `<run>/quarantine/*.parquet`.

Columns: step, uid, shard, row_group (in the shard), row (in the row group), reason.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq

from nev.common.collectives import gather_objects
from nev.common.errors import NevError
from nev.config.experiment import Experiment
from nev.data.block import Block
from nev.data.plan import Plan
from nev.storage.files import StorageError, filesystem, join, list_files, storage_errors_as, write_atomic

LEAST_ROWS = 10_000  # row groups come whole: a rotten one at the start is a large share of few rows


class TooManyBadRows(NevError, RuntimeError):
    """More rows than `data.max_bad_share` could not be used. The message names the worst shards."""


class Quarantine:
    """One rank's table of bad rows.

    `by_shard` and `by_reason` count those that this rank met; rank 0's begin with what the run had found before step
    `first_step`, on any rank. What an interrupted attempt wrote of later steps is removed: they come again.
    """

    def __init__(self, run: str, shards: tuple[str, ...], rank: int, first_step: int, world: int = 1) -> None:
        self.folder = join(run, "quarantine")
        self.by_shard: Counter[str] = Counter()
        self.by_reason: Counter[str] = Counter()
        self.examples: dict[str, str] = {}  # kind of reason -> a row's uid and its own reason
        self._shards = shards
        self._rank, self._world = rank, world
        self._rows: list[dict[str, str | int]] = []
        if rank == 0:
            self._take_up(first_step)

    def _take_up(self, first_step: int) -> None:
        fs, folder = filesystem(self.folder)
        with storage_errors_as(self.folder, "listed"):
            names = list_files(self.folder)
        for name in names:
            if not (found := re.fullmatch(r"step-(\d+)-rank-\d+\.parquet", name)):
                continue
            with storage_errors_as(
                join(self.folder, name), "taken up", "It is damaged: remove it, and its rows are not counted."
            ):
                if int(found[1]) > first_step:
                    fs.rm_file(f"{folder}/{name}")
                    continue
                table = pq.read_table(
                    pa.BufferReader(fs.cat_file(f"{folder}/{name}")), columns=["shard", "uid", "reason"]
                )
            for row in table.to_pylist():
                self._count(row["shard"], row["uid"], row["reason"])

    def note(self, step: int, block: Block) -> None:
        """Keep the invalid rows of one of a step's blocks."""
        for at in (~block["valid"]).nonzero()[0]:
            shard, reason = self._shards[int(block["shard"][at])], str(block["reason"][at])
            self._rows.append(
                {
                    "step": step,
                    "uid": str(block["uid"][at]),
                    "shard": shard,
                    "row_group": int(block["row_group"][at]),
                    "row": int(block["row"][at]),
                    "reason": reason,
                }
            )
            self._count(shard, str(block["uid"][at]), reason)

    def _count(self, shard: str, uid: str, reason: str) -> None:
        self.examples.setdefault(classify_reason(reason), f"{uid}: {reason}")
        self.by_shard[shard] += 1
        self.by_reason[classify_reason(reason)] += 1

    def flush(self, done: int) -> None:
        """Write what was kept since the last flush, named by step and rank, so that a repeated step overwrites itself.

        Where storage refuses it, it is kept for the next: a full disk must not end the run over a list.
        """
        if not self._rows:
            return
        location, sink = join(self.folder, f"step-{done:08d}-rank-{self._rank}.parquet"), io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self._rows), sink)
        with suppress(StorageError), storage_errors_as(location, "written"):
            write_atomic(location, sink.getvalue())
            self._rows = []

    def totals(self) -> tuple[Counter[str], Counter[str], dict[str, str]]:
        """(by shard, by reason, examples) over all ranks, which call this together."""
        counts = gather_objects((self.by_shard, self.by_reason, self.examples), self._world)
        examples = {key: said for part in reversed(counts) for key, said in part[2].items()}  # the first rank's
        return sum((part[0] for part in counts), Counter()), sum((part[1] for part in counts), Counter()), examples

    def metrics(self) -> dict[str, float]:
        """`bad_rows/REASON` -> rows since the run's first step, over all ranks, which call this together."""
        _, reasons, _ = self.totals()
        found: Counter[str] = Counter()
        for reason, count in reasons.items():
            found[f"bad_rows/{_slug(reason)}"] += count  # two reasons may differ by signs alone
        return {name: float(count) for name, count in found.items()}


def too_many_bad_rows(bad_rows: int, done: int, plan: Plan, config: Experiment) -> bool:
    """Whether `bad_rows` of the rows of `done` steps are more than `data.max_bad_share`; of 10,000, or an epoch, at least."""
    batch = config.train.global_batch
    least = min(LEAST_ROWS, plan.steps_per_epoch * batch)
    return bad_rows > config.data.max_bad_share * max(done * batch, least)


def classify_reason(reason: str) -> str:
    """A reason without what is a row's own: numbers, and the detail behind the first colon."""
    return re.sub(r"\b\d+(x\d+)?\b", "N", reason.split(":")[0])


def _slug(reason: str) -> str:
    """A reason as part of an MLflow metric's name."""
    return re.sub(r"[^a-z0-9]+", "_", reason.lower()).strip("_")[:80]


def describe_bad_rows(quarantine: Quarantine, bad_rows: int, done: int, config: Experiment) -> str:
    """The error past `data.max_bad_share`, the same on every rank: they all call it together, at the same step."""
    shards, reasons, examples = quarantine.totals()
    quarantine.flush(done)
    worst = ", ".join(f"{name} ({count})" for name, count in shards.most_common(5))
    why = ", ".join(f"{reason} ({count}, such as {examples[reason]})" for reason, count in reasons.most_common(3))
    return (
        f"{bad_rows} of {done * config.train.global_batch} rows could not be used, more than "
        f"data.max_bad_share = {config.data.max_bad_share}. Worst shards: {worst}. Reasons: {why}. "
        f"Each row, as often as it was met, is listed in {quarantine.folder} (parquet). Raise data.max_bad_share to go on, or "
        "mend or drop those shards and start under another name."
    )
