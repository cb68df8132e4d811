"""Workers that come and go: any number of them trains the same rows to the same weights, and all leave together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.gloo import on_ranks
from helpers.training import Reports, blocks, load_train_state, prepare_job, train_reader

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.data.block import Block, BlockReader
from nev.models.precision import choose_precision
from nev.models.text import TextTower
from nev.runs import checkpoint
from nev.train.job import Job, find_resume_point
from nev.train.worker.batch import BatchBuilder
from nev.train.worker.collectives import StopConsensus
from nev.train.worker.loop import train
from nev.train.worker.state import RankContext

Make = Callable[..., Experiment]
CPU = torch.device("cpu")


def _trains(rank: int, job: Job, reader: BlockReader, world: int, leave_after: int | None) -> dict[str, Any]:
    me = RankContext(rank, world, CPU, choose_precision("fp32", CPU))
    train_state, start = load_train_state(job, me)
    asked = [0]
    reports = Reports()

    def leave() -> bool:
        asked[0] += 1
        return rank == world - 1 and asked[0] == leave_after

    stream = blocks(reader, job.plan, start.step, job.stop_step, rank, world)
    done = train(job, me, train_state, start, stream, reports, leave)
    losses = [metrics["loss"] for _, metrics in sorted(reports.metrics.items()) if "loss" in metrics]
    return {"done": done, "losses": losses}


def trained(job: Job, reader: BlockReader, world: int, folder: Path, leave_after: int | None = None) -> list[Any]:
    """What `world` ranks come to."""
    folder.mkdir()
    work = functools.partial(_trains, job=job, reader=reader, world=world, leave_after=leave_after)
    return on_ranks(work, world, folder)


@pytest.mark.slow
def test_any_number_of_workers_trains_to_the_same_weights(tiny: Make, text: TextTower, tmp_path: Path) -> None:
    found = {}
    for world in (1, 2, 3, 4):  # a step has four blocks: of three ranks one has two
        config = tiny(
            name=f"of-{world}", data__block_rows=16, train__steps=5, workers={"min": 1, "max": 4}, data__val=None
        )
        config = config.model_copy(update={"eval": type(config.eval)()})
        job, reader = prepare_job(config, text), train_reader(config, text)
        ranks = trained(job, reader, world, tmp_path / f"ranks-{world}")
        assert {rank["done"] for rank in ranks} == {5}
        _, weights = checkpoint.load_model(f"{job.run}/checkpoints/step-00000005")
        found[world] = weights, ranks[0]["losses"]
    weights, losses = found[1]
    assert len(losses) == 5
    for world in (2, 3, 4):
        torch.testing.assert_close(torch.tensor(found[world][1]), torch.tensor(losses), atol=1e-5, rtol=0)
        for name, tensor in weights.items():
            torch.testing.assert_close(
                found[world][0][name], tensor, atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.slow
def test_all_leave_after_the_same_step_and_others_go_on(tiny: Make, text: TextTower, tmp_path: Path) -> None:
    settings = {"data__block_rows": 16, "train__steps": 6, "workers": {"min": 1, "max": 4}, "data__val": None}

    def made(name: str) -> Job:
        config = tiny(name=name, **settings)
        return prepare_job(config.model_copy(update={"eval": type(config.eval)()}), text)

    whole, parts = made("whole"), made("parts")
    reader = train_reader(whole.config, text)
    trained(whole, reader, 1, tmp_path / "whole")
    left = trained(parts, reader, 3, tmp_path / "first", leave_after=2)
    assert [rank["done"] for rank in left] == [2, 2, 2], (
        "one was asked, and all left, after the step that was under way"
    )
    assert find_resume_point(parts.run).step == 2
    trained(parts, reader, 2, tmp_path / "second")
    (_, expected), (_, weights) = (
        checkpoint.load_model(f"{job.run}/checkpoints/step-00000006") for job in (whole, parts)
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-5, rtol=0)


def _asks(rank: int) -> list[bool]:
    agreement = StopConsensus(2, lambda: rank == 1 and dist.is_initialized(), 60)
    nobody = StopConsensus(2, lambda: False, 60)
    return [agreement.should_stop(), nobody.should_stop()]


@pytest.mark.slow
def test_one_that_is_asked_is_heard_by_all(tmp_path: Path) -> None:
    assert on_ranks(_asks, 2, tmp_path) == [[True, False], [True, False]]
    assert StopConsensus(1, lambda: True, 60).should_stop()
    assert not StopConsensus(1, lambda: False, 60).should_stop()


@pytest.mark.parametrize("online", [False, True])
def test_rows_behind_a_ranks_blocks_are_invalid(online: bool) -> None:
    text = np.full((2, 5), 3, np.int32) if online else np.ones((2, 5), np.float16)
    block: Block = {"image": np.full((2, 4, 4, 3), 9, np.uint8), "text": text, "valid": np.ones(2, bool)}
    filling = BatchBuilder(room=2, block_rows=2, device=CPU)
    filling.add(block)
    batch = filling.batch()
    assert batch.valid.tolist() == [True, True, False, False]
    assert batch.images[:2].eq(9).all()
    assert not batch.images[2:].any()
    assert batch.text[:2].eq(3 if online else 1).all()
    assert batch.text[2:].eq(-1 if online else 0).all()


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ({"count": 2, "min": 1, "max": 2}, "give `count`, or `min` and `max`"),
        ({"min": 1}, "give `count`, or `min` and `max`"),
        ({"min": 3, "max": 2}, r"min \(3\) must not be above max \(2\)"),
        ({"min": 1, "max": 3}, r"workers.max \(3\) is more than the 2 blocks of a step"),
    ],
)
def test_numbers_that_cannot_be_are_refused(tiny: Make, workers: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(workers=workers)


def test_parts_must_divide_every_share(tiny: Make) -> None:
    sizes = {"data__block_rows": 8, "train__global_batch": 64}
    assert tiny(**sizes, train__micro_batch=4, workers={"min": 1, "max": 5}).local_batch(5) == 16
    with pytest.raises(ConfigError, match=r"micro_batch \(16\) must divide .* 24 rows at W = 3"):
        tiny(**sizes, train__micro_batch=16, workers={"min": 1, "max": 4})
