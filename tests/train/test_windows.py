"""Windows before a run starts: what they take, and what is said of another order of rows."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.training import prepare_job

from benchmarks.scale import made_up_index
from nev.config.base import ConfigError
from nev.data.mixture import make_mixture
from nev.data.plan import Plan, choose_window
from nev.data.windows import task_blocks
from nev.train.driver import resources
from nev.train.driver.resources import (
    check_object_store,
    check_window_memory,
    note_rare_sets,
    note_read_twice,
    window_bytes,
)
from nev.train.driver.same_run import _describe_window
from nev.train.driver.setup import describe_run, make_plan

GIB = 2**30


def test_windows_fit_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    index = made_up_index(256)  # 30 kB a row: a window of four row groups takes 29 MiB
    plan = Plan(index.rows, 0, 65_536, 256, choose_window(index.rows, 256))
    assert window_bytes([index], plan) == 4 * 256 * 30_000
    monkeypatch.setattr(resources, "may_grow", lambda: False)
    monkeypatch.setattr(resources, "cluster_cpus", lambda: 16)
    monkeypatch.setattr(resources, "machine_memory", lambda: GIB)
    check_window_memory([index], plan)
    monkeypatch.setattr(resources, "machine_memory", lambda: GIB // 2)
    with pytest.raises(
        ConfigError, match=r"16 CPUs .* 0\.5 GiB of memory: lower data\.window \(here 4 row groups\), or write"
    ):
        check_window_memory([index], plan)
    with pytest.raises(ConfigError, match=r"of memory: write the shards again with smaller row groups"):
        check_window_memory([made_up_index(10_000)], Plan(made_up_index(10_000).rows, 0, 65_536, 256, 1))
    monkeypatch.setattr(resources, "may_grow", lambda: True)
    check_window_memory([index], plan)


def test_a_window_on_s3_takes_its_bytes_twice() -> None:
    """Its row groups are decoded at the same time. A mixture's window has row groups of both sets."""
    index = made_up_index(256)
    remote = replace(index, root="s3://bucket/set")
    plan = Plan(index.rows, 0, 65_536, 256, 4)
    assert window_bytes([remote], plan) == 2 * window_bytes([index], plan)
    small = replace(index, rows=index.rows[:400], nbytes=index.nbytes[:400])
    mixture = make_mixture([index.rows, small.rows], (3, 1), False, 0, 1024, 256, window=8)
    groups = mixture.groups_per_window
    assert groups == (8, 4), "six and two, those of a last block, and parts at both ends"
    far = replace(small, root="s3://bucket/set")
    assert window_bytes([index, small], mixture) == 12 * 256 * 30_000
    assert window_bytes([index, far], mixture) == (8 + 2 * 4) * 256 * 30_000


def test_the_blocks_of_a_window_fit_the_object_store(tiny: Any, text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    job = prepare_job(tiny(), text)
    window = job.plan.blocks_per_window * job.plan.block_rows * resources.row_bytes(job)
    step = job.config.train.global_batch * resources.row_bytes(job)
    monkeypatch.setattr(resources, "may_grow", lambda: False)
    for store, refused in ((max(step, 1.7 * window), False), (max(step, 1.6 * window), 1.6 * window > step)):
        monkeypatch.setattr(ray, "cluster_resources", lambda store=store: {"object_store_memory": store})
        if refused:
            with pytest.raises(ConfigError, match="the decoded pictures of a window take"):
                check_object_store(job)
        else:
            check_object_store(job)
    # Each of two streams may run a task, of at most its part of a step.
    several = replace(job, config=tiny(data__streams=2, workers__count=2))
    windows = 2 * task_blocks(job.plan, 2) * job.plan.block_rows * resources.row_bytes(job)
    for store, refused in ((1.7 * windows, False), (1.6 * windows, True)):
        monkeypatch.setattr(ray, "cluster_resources", lambda store=store: {"object_store_memory": store})
        with pytest.raises(ConfigError, match="pictures of 2 windows take") if refused else nullcontext():
            check_object_store(several)


def test_the_start_says_how_rows_are_shuffled(tiny: Any, text: Any) -> None:
    job = prepare_job(tiny(data__window=2), text)
    assert "shuffled in windows of 2 row groups (up to 3 MiB)" in describe_run(job, 0, 3 * 2**20)
    assert "shuffled" not in describe_run(prepare_job(tiny(data__window=0), text), 0, 3 * 2**20)


def test_a_window_of_the_config_is_that_of_the_plan(tiny: Any, text: Any) -> None:
    plan = prepare_job(tiny(), text).plan
    assert plan.window == choose_window(plan.rows, plan.block_rows)
    index = made_up_index(256)
    config = tiny(data__used_rows=0.25, train__global_batch=256, data__block_rows=256)
    part = make_plan(config, [index])
    assert part.window == choose_window(np.floor(index.rows * 0.25).astype(np.int64), 256)


def test_row_groups_that_are_read_twice_are_told_before_a_start() -> None:
    index = replace(made_up_index(10_000), root="s3://bucket/set")
    uneven = Plan(np.full(100, 1000), 0, 512, 256, 2)
    assert (note_read_twice([index], uneven, 1) or "").startswith(
        "row groups such as those of 1,000 rows are no whole number of blocks of 256 rows, so about 46% of the rows are read"
    )
    tars = Plan(np.array([256, 256, 256, 232] * 100), 0, 512, 256, 4)
    assert "such as those of 232 rows" in (note_read_twice([index], tars, 1) or "")
    assert note_read_twice([index], Plan(np.full(100, 1000), 0, 500, 250, 2), 1) is None
    assert note_read_twice([index], Plan(np.full(100, 10_000), 0, 512, 256, 1), 1) is None
    assert note_read_twice([index], Plan(np.array([1024] * 999 + [1000]), 0, 512, 256, 2), 1) is None
    for streams in (1, 2):
        assert note_read_twice([made_up_index(10_000)], uneven, streams) is None, (
            "on a disk a second reading costs little"
        )
    both = note_read_twice([index], uneven, 2) or ""
    assert "so about 46% of the rows are read twice. A data.block_rows" in both
    assert "each of 2 streams hands out 1 blocks of a step" in both
    assert both.endswith("are read once more. A smaller data.window or data.streams avoids that.")
    cut = note_read_twice([index], Plan(np.full(100, 1024), 0, 1024, 256, 2), 2) or ""
    assert cut.startswith(
        "each of 2 streams hands out 2 blocks of a step, and windows of some 8 blocks are cut there, so "
    )
    assert "rows are read twice." in cut


def test_sets_that_most_steps_lack_are_told() -> None:
    sets = [np.full(4000, 256), np.full(40, 256)]
    rare = note_rare_sets(make_mixture(sets, (99, 1), False, 0, 4096, 256), ("web", "coco")) or ""
    assert rare.startswith(
        "coco: a set comes in whole row groups, one of coco in some 25,600 rows, and a step has 4,096"
    )
    assert note_rare_sets(make_mixture(sets, (99, 1), False, 0, 16_384, 256), ("web", "coco")) is None
    assert note_rare_sets(Plan(sets[0], 0, 256, 256), ()) is None


def test_another_window_is_named_where_the_plan_differs(tiny: Any) -> None:
    config = tiny(data__window=3)
    before = json.loads(config.model_dump_json())
    assert _describe_window(before, config) == ""
    assert _describe_window(before, tiny(data__window=1)) == " (data.window: 3 there, 1 here)"
    assert _describe_window(before, tiny()) == " (data.window: 3 there, null here)"
    del before["data"]["window"]
    assert _describe_window(before, config) == " (that run has no windows: it continues with data.window=0)"
    assert _describe_window(before, tiny(data__window=0)) == ""
