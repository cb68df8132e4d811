"""A config in numbers: what is counted, and what is said of what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.memory import WIDTH, experiment

from nev.config.base import ConfigError
from nev.config.data import TrainSet
from nev.config.experiment import Experiment
from nev.models.vision import build_vision
from nev.planner.workload import Workload, count_steps, read_workload


def read(config: Experiment, world: int = 2) -> Workload:
    return read_workload(config, WIDTH, None, [1, 2, 4], world, hidden=0.5)


def test_a_small_tower_in_numbers() -> None:
    """Weights, collectives and FLOPs against the tower itself: a block has 12 d^2 multiply-adds a token, forward."""
    config = experiment(batch=64, train={"micro_batch": 16, "precision": "bf16"})
    work = read(config)
    tower = build_vision(config.vision, 32, WIDTH)
    assert work.weights == sum(parameter.nbytes for parameter in tower.parameters())
    assert work.messages[1] == ()
    sent = {message.purpose: message for message in work.messages[4]}
    assert sent["gradients (DDP)"].nbytes == work.weights
    assert (sent["gradients (DDP)"].hidden, sent["columns"].hidden) == (0.5, 0.0)
    assert work.decoded == 32 * 32 * 3
    blocks = 3 * 2 * 4 * 12 * 64**2 * 16  # forward and backward, 2 a multiply-add, depth 4, width 64, 16 patches
    assert work.flops is not None
    assert blocks < work.flops < 1.6 * blocks
    assert work.memory is not None
    assert (work.local(4), work.parts(4), work.parts(1)) == (16, 16, 16)


@pytest.mark.parametrize(
    ("train", "rows", "steps"),
    [
        ({"steps": 7}, None, 7),
        ({"steps": None, "samples": 130}, None, 3),
        ({"steps": None, "epochs": 2}, 200, 6),
    ],
)
def test_the_length_of_a_run(train: dict[str, Any], rows: int | None, steps: int) -> None:
    assert count_steps(experiment(batch=64, train=train), rows) == steps


def test_an_epoch_of_several_sets_does_not_end_with_a_step() -> None:
    config = experiment(batch=64, train={"steps": None, "epochs": 2})
    sets = config.data.model_copy(update={"train": (TrainSet(path="a"), TrainSet(path="b", epochs=2))})
    assert count_steps(config.model_copy(update={"data": sets}), 232) == 7
    assert count_steps(config, 232) == 6


def test_epochs_need_the_rows() -> None:
    config = experiment(batch=64, train={"steps": None, "epochs": 2})
    with pytest.raises(ConfigError, match="give them with --rows"):
        count_steps(config, None)
    with pytest.raises(ConfigError, match="less than a step"):
        count_steps(config, 63)


def test_what_cannot_be_counted_is_said() -> None:
    fp32 = read(experiment(batch=64, train={"precision": "fp32"}))
    assert fp32.flops is None
    assert "fp32" in fp32.uncounted
    online = read(experiment(batch=64, text={"mode": "online"}, train={"precision": "bf16"}))
    assert (online.flops, online.memory) == (None, None)
    assert "text tower in the loop" in online.uncounted
