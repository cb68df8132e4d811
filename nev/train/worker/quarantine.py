"""Bad rows, which could not be used: counted by reason, and listed in `<run>/quarantine/*.parquet`.

Columns: step, uid, shard (its path), row_group (in the shard), row (in the row group), reason; set (its number) in a mixture.
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
from nev.data.block_plan import BlockPlan
from nev.storage.files import StorageError, filesystem, join, list_files, storage_errors_as, write_atomic

# The share of bad rows is of so many rows at least: one bad row group at the start is a large share of few rows.
LEAST_ROWS = 10_000


class TooManyBadRows(NevError, RuntimeError):
    """More rows than `data.max_bad_share` could not be used. The message names the worst shards."""


class Quarantine:
    """The bad rows of a rank.

    first_step: the step from which this start of the run trains.
    sets: names of a mixture's sets, in order. A set keeps its count where its name changes.
    by_shard, by_reason, by_set: number of bad rows of this rank. Rank 0 also counts those of all ranks before `first_step`.
    examples: kind of reason -> a row's uid and its own reason.
    Files of later steps than `first_step`, from a start that was interrupted, are removed: these steps come again.
    """

    def __init__(
        self,
        run: str,
        shards: tuple[str, ...],
        rank: int,
        first_step: int,
        world: int = 1,
        sets: tuple[str, ...] = (),
    ) -> None:
        self.folder = join(run, "quarantine")
        self.by_shard: Counter[str] = Counter()
        self.by_reason: Counter[str] = Counter()
        self.by_set: Counter[int] = Counter()
        self.examples: dict[str, str] = {}
        self._shards, self._sets = shards, sets
        self._rank, self._world = rank, world
        self._rows: list[dict[str, str | int]] = []
        if rank == 0:
            self._count_earlier(first_step)

    def _count_earlier(self, first_step: int) -> None:
        """Count the rows in the files up to a step, and remove the files of later steps."""
        fs, folder = filesystem(self.folder)
        with storage_errors_as(self.folder, "listed"):
            names = list_files(self.folder)
        for name in names:
            if not (match := re.fullmatch(r"step-(\d+)-rank-\d+\.parquet", name)):
                continue
            with storage_errors_as(
                join(self.folder, name), "read", "The file is damaged: remove it. Its rows are then not counted."
            ):
                if int(match[1]) > first_step:
                    fs.rm_file(f"{folder}/{name}")
                    continue
                columns = ["shard", "uid", "reason", *(["set"] if self._sets else [])]
                table = pq.read_table(pa.BufferReader(fs.cat_file(f"{folder}/{name}")), columns=columns)
            for row in table.to_pylist():
                self._count(row["shard"], row["uid"], row["reason"])
                self.by_set[row.get("set", 0)] += 1

    def note(self, step: int, block: Block) -> None:
        """Record the invalid rows of a block."""
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
                    **({"set": int(block["set"][at])} if self._sets else {}),
                }
            )
            self._count(shard, str(block["uid"][at]), reason)
            self.by_set[int(block["set"][at]) if self._sets else 0] += 1

    def _count(self, shard: str, uid: str, reason: str) -> None:
        self.examples.setdefault(classify_reason(reason), f"{uid}: {reason}")
        self.by_shard[shard] += 1
        self.by_reason[classify_reason(reason)] += 1

    def flush(self, done: int) -> None:
        """Write the rows since the last flush to a file named by step and rank, so a repeated step overwrites its file.

        Rows that storage refuses wait for the next flush: a full disk must not end the run for a list.
        """
        if not self._rows:
            return
        location, sink = join(self.folder, f"step-{done:08d}-rank-{self._rank}.parquet"), io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self._rows), sink)
        with suppress(StorageError), storage_errors_as(location, "written"):
            write_atomic(location, sink.getvalue())
            self._rows = []

    def totals(self) -> tuple[Counter[str], Counter[str], dict[str, str]]:
        """(by shard, by reason, examples) over all ranks. Every rank calls this: one collective."""
        counts = gather_objects((self.by_shard, self.by_reason, self.examples), self._world)
        examples = {kind: row for part in reversed(counts) for kind, row in part[2].items()}  # the lowest rank's
        return sum((part[0] for part in counts), Counter()), sum((part[1] for part in counts), Counter()), examples

    def metrics(self) -> dict[str, float]:
        """`bad_rows/REASON`, and in a mixture `sets/NAME/bad_rows`: rows since the run's first step, over all ranks.

        Every rank calls this: one collective.
        """
        ranks = gather_objects((self.by_reason, self.by_set), self._world)
        reasons: Counter[str] = sum((part[0] for part in ranks), Counter())
        of_sets: Counter[int] = sum((part[1] for part in ranks), Counter())
        counts = Counter({f"sets/{name}/bad_rows": of_sets[number] for number, name in enumerate(self._sets)})
        for reason, count in reasons.items():
            counts[f"bad_rows/{_slug(reason)}"] += count  # two reasons may differ in punctuation alone
        return {name: float(count) for name, count in counts.items()}


def too_many_bad_rows(bad_rows: int, done: int, plan: BlockPlan, config: Experiment) -> bool:
    """Whether the bad rows of `done` steps are more than the share `data.max_bad_share`.

    The share is that of the steps' rows, but of 10,000 rows, or of an epoch, at least.
    """
    batch = config.train.global_batch
    least = min(LEAST_ROWS, plan.total_rows - plan.tail_rows)
    return bad_rows > config.data.max_bad_share * max(done * batch, least)


def classify_reason(reason: str) -> str:
    """The kind of a reason: without numbers, and without the detail behind the first colon."""
    return re.sub(r"\b\d+(x\d+)?\b", "N", reason.split(":")[0])


def _slug(reason: str) -> str:
    """A reason as part of an MLflow metric's name."""
    return re.sub(r"[^a-z0-9]+", "_", reason.lower()).strip("_")[:80]


def describe_bad_rows(quarantine: Quarantine, bad_rows: int, done: int, config: Experiment) -> str:
    """The message of TooManyBadRows. Every rank calls this, and gets the same. Writes the rows that are not written yet."""
    shards, reasons, examples = quarantine.totals()
    quarantine.flush(done)
    worst = ", ".join(f"{name} ({count})" for name, count in shards.most_common(5))
    why = ", ".join(f"{reason} ({count}, such as {examples[reason]})" for reason, count in reasons.most_common(3))
    return (
        f"{bad_rows} of {done * config.train.global_batch} rows could not be used, more than "
        f"data.max_bad_share = {config.data.max_bad_share}. Worst shards: {worst}. Reasons: {why}. "
        f"{quarantine.folder} (parquet) lists each row, once for each time that it was read. Raise data.max_bad_share to go "
        "on, or repair or remove those shards and start under another name."
    )
