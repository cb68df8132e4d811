"""The schedule is a pure function of the step; weight decay is for matrices alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nev.config.experiment import Optim
from nev.train.core.optim import learning_rate, make_optimizer, set_learning_rate


def test_warm_up_then_cosine_to_the_final_rate() -> None:
    config = Optim(lr=1.0, warmup_steps=10, final_lr=0.1)
    rates = [learning_rate(step, 110, config) for step in range(111)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[110] == pytest.approx(0.1)


def test_constant_after_warm_up() -> None:
    config = Optim(lr=0.5, warmup_steps=2, schedule="constant")
    assert [learning_rate(step, 4, config) for step in range(4)] == [0.25, 0.5, 0.5, 0.5]


@given(st.integers(0, 50), st.integers(1, 500), st.floats(1e-6, 1.0))
def test_rate_stays_in_bounds_and_never_rises_after_warm_up(warmup: int, length: int, lr: float) -> None:
    config = Optim(lr=lr, warmup_steps=warmup)
    rates = [learning_rate(step, warmup + length, config) for step in range(warmup + length)]
    assert all(0 <= rate <= lr * (1 + 1e-12) for rate in rates)
    after = rates[warmup:]
    assert all(later <= earlier or math.isclose(later, earlier) for earlier, later in itertools.pairwise(after))


def test_decay_leaves_out_biases_norms_and_the_logit_scale() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model.log_scale = nn.Parameter(torch.tensor(1.0))
    optimizer = make_optimizer(model, Optim(lr=0.1, betas=(0.8, 0.9), weight_decay=0.3, eps=1e-7))
    decayed, plain, scalars = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"], scalars["weight_decay"]) == (0.3, 0.0, 0.0)
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3)]
    assert [p.ndim for p in plain["params"]] == [1, 1, 1]
    assert scalars["params"] == [model.log_scale]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}
    set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_a_text_tower_has_its_share_of_the_rate() -> None:
    model = nn.ModuleDict({"vision": nn.Linear(3, 4), "text": nn.Linear(3, 4)})
    optimizer = make_optimizer(model, Optim(lr=0.5, text_lr_ratio=0.1))
    for rate in (0.5, 0.2):
        set_learning_rate(optimizer, rate)
        rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        assert {rates[p] for p in model["vision"].parameters()} == {rate}
        assert {rates[p] for p in model["text"].parameters()} == {rate * 0.1}
