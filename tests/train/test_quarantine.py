"""The quarantine: which rows were left out, where they lie, and how often for which reason."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from nev.config.experiment import Experiment
from nev.config.file import parse
from nev.data.block import Block
from nev.data.plan import Plan
from nev.train.worker.quarantine import Quarantine, classify_reason, too_many_bad_rows

SHARDS = ("a.parquet", "b.parquet")


def block(*bad: tuple[str, int, int, int, str]) -> Block:
    """A block of one good row and these: (uid, shard, row group, row, reason)."""
    columns = list(zip(("good", 0, 0, 0, ""), *bad, strict=True))
    names = ("uid", "shard", "row_group", "row", "reason")
    kinds = (object, np.int32, np.int32, np.int32, object)
    made = {name: np.array(column, dtype) for name, column, dtype in zip(names, columns, kinds, strict=True)}
    return {**made, "valid": np.array([True, *[False] * len(bad)])}


def test_a_bad_row_is_kept_with_its_place(tmp_path: Path) -> None:
    quarantine = Quarantine(str(tmp_path), SHARDS, rank=0, first_step=0)
    for one in (block(), block(("u", 1, 4, 17, "JPEG: cut short"))):
        quarantine.note(3, one)
    quarantine.flush(10)
    (path,) = (tmp_path / "quarantine").iterdir()
    place = {"shard": "b.parquet", "row_group": 4, "row": 17}
    assert pq.read_table(path).to_pylist() == [{"step": 3, "uid": "u", **place, "reason": "JPEG: cut short"}]
    quarantine.flush(20)  # nothing new: no file
    assert list((tmp_path / "quarantine").iterdir()) == [path]


def test_rows_are_counted_by_reason_without_what_is_their_own(tmp_path: Path) -> None:
    quarantine = Quarantine(str(tmp_path), SHARDS, rank=0, first_step=0)
    reasons = (
        "JPEG: cut",
        "JPEG: no header",
        "image has 9 bytes, more than limits.max_bytes",
        "image is 7x9, more than …",
    )
    quarantine.note(0, block(*(("u", 0, 0, n, reason) for n, reason in enumerate((*reasons, "jpeg!: cut")))))
    assert quarantine.metrics() == {
        "bad_rows/jpeg": 3.0,
        "bad_rows/image_has_n_bytes_more_than_limits_max_bytes": 1.0,
        "bad_rows/image_is_n_more_than": 1.0,
    }
    assert quarantine.totals()[2]["JPEG"] == "u: JPEG: cut"
    assert classify_reason("not one of JPEG, JPEG2000") == "not one of JPEG, JPEG2000"
    assert classify_reason("image is 70x90, more than limits.max_pixels") == classify_reason(
        "image is 8x8, more than limits.max_pixels"
    )


@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_run_counts_what_came_before_once_whatever_the_world(world: int, tmp_path: Path) -> None:
    first = [Quarantine(str(tmp_path), SHARDS, rank, first_step=0) for rank in range(4)]
    for rank, quarantine in enumerate(first):
        quarantine.note(1, block((f"u{rank}", 0, 0, rank, "image is null")))
        quarantine.flush(2)
        quarantine.note(2, block((f"v{rank}", 1, 0, rank, "image is null")))  # is repeated after step 2
        quarantine.flush(4)
    resumed = [Quarantine(str(tmp_path), SHARDS, rank, first_step=2) for rank in range(world)]
    assert sum(one.by_reason["image is null"] for one in resumed) == 4
    for rank, quarantine in enumerate(resumed):
        quarantine.note(2, block(*((f"v{n}", 1, 0, n, "image is null") for n in range(rank, 4, world))))
        quarantine.flush(4)
    rows = [row for path in (tmp_path / "quarantine").iterdir() for row in pq.read_table(path).to_pylist()]
    assert sorted(row["uid"] for row in rows) == sorted(
        f"{classify_reason}{n}" for classify_reason in "uv" for n in range(4)
    )
    assert sum((one.by_shard for one in resumed), start=type(resumed[0].by_shard)()) == {"a.parquet": 4, "b.parquet": 4}


@pytest.mark.parametrize(("rows", "least"), [(100_000, 10_000), (2_000, 1_920)])
def test_a_rotten_row_group_at_the_start_is_no_large_share(rows: int, least: int) -> None:
    config = parse(
        Experiment,
        {
            "name": "bad",
            "data": {"train": "nowhere", "block_rows": 128, "max_bad_share": 0.05},
            "vision": {"trunk": "vit_tiny_patch16_224"},
            "optim": {"lr": 0.01},
            "train": {"global_batch": 128, "steps": 1},
        },
    )
    plan = Plan(np.full(rows // 100, 100, np.int64), 0, 128, 128)
    assert not too_many_bad_rows(least // 20, 10, plan, config)
    assert too_many_bad_rows(least // 20 + 1, 10, plan, config)
    assert not too_many_bad_rows(6_400, 1_000, plan, config)
    assert too_many_bad_rows(6_401, 1_000, plan, config)
