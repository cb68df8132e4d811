"""The schedule is a pure function of the step; weight decay is for matrices alone."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel

from nev.config.base import ConfigError
from nev.config.model import Vision
from nev.config.train import Optim
from nev.models.vision import build_vision
from nev.train.core.optim import make_optimizer, set_learning_rate
from nev.train.core.schedule import check_schedule, decay_start, first_changed_step, learning_rate


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


def test_warm_up_stable_decay() -> None:
    config = Optim(lr=1.0, warmup_steps=2, schedule="wsd", decay_steps=4, final_lr=0.2)
    rates = [learning_rate(step, 10, config) for step in range(11)]
    assert rates[:7] == [0.5, 1, 1, 1, 1, 1, 1]
    assert rates[7:] == pytest.approx(
        [0.2 + 0.8 * (1 - math.sqrt(done / 4)) for done in (1, 2, 3, 4)]
    )  # 1 - sqrt of the paper
    assert decay_start(10, config) == 6
    assert decay_start(100, Optim(lr=1.0, schedule="wsd")) == 80, "a fifth of the run"
    check_schedule(6, config)
    with pytest.raises(ConfigError, match=r"warmup_steps \(2\) and optim\.decay_steps \(4\) are more than the 5 steps"):
        check_schedule(5, config)
    with pytest.raises(ConfigError, match=r"optim\.decay_steps \(20\) are more than the 100 steps"):
        check_schedule(100, Optim(lr=1.0, schedule="wsd", warmup_steps=90))
    with pytest.raises(ValueError, match="decay_steps belongs to schedule: wsd"):
        Optim(lr=1.0, decay_steps=4)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 8), st.integers(1, 8))
def test_a_longer_wsd_parts_after_the_decay_has_begun(short: int, more: int, warmup: int, decay: int) -> None:
    config, total = Optim(lr=1.0, warmup_steps=warmup, schedule="wsd", decay_steps=decay), warmup + decay + short
    apart = first_changed_step(total, (total, config), (total + more, config))
    start = decay_start(total, config)
    assert start is not None
    # The first step of the decay still has the whole rate.
    assert apart == (start + 1 if start + 1 < total else None)


@given(st.integers(0, 50), st.integers(1, 500), st.floats(1e-6, 1.0), st.sampled_from(["cosine", "wsd", "constant"]))
def test_rate_stays_in_bounds_and_never_rises_after_warm_up(warmup: int, length: int, lr: float, schedule: Any) -> None:
    config = Optim(lr=lr, warmup_steps=warmup, schedule=schedule)
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


@pytest.mark.parametrize(
    "trunk",
    [
        "vit_tiny_patch16_224",
        "vit_base_patch16_siglip_224",
        "eva02_tiny_patch14_224",
        "beit_base_patch16_224",
        "convnext_atto",
    ],
)
def test_decay_leaves_out_what_timm_leaves_out(trunk: str) -> None:
    """Class tokens, registers, positions and tables of relative positions, and the latents of pools."""
    model = timm.create_model(trunk, num_classes=0)
    (decayed, *_) = make_optimizer(model, Optim(lr=0.1, weight_decay=0.3)).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    left_out = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    expected = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert {names[parameter] for parameter in decayed["params"]} == expected - left_out - {"attn_pool.latent"}


def test_decay_leaves_out_the_latent_of_a_pool_and_the_positions_of_a_text_tower() -> None:
    vision = build_vision(Vision(trunk="vit_tiny_patch16_224", pool="nomic"), 224, 24)
    text = BertModel(BertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    model = nn.ModuleDict({"vision": vision, "text": text})
    groups = make_optimizer(model, Optim(lr=0.1, weight_decay=0.3)).param_groups
    decays = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    names = dict(model.named_parameters())
    for plain in ("pool.latent", "trunk.cls_token", "trunk.pos_embed"):
        assert decays[names[f"vision.{plain}"]] == 0.0
    assert decays[names["text.embeddings.position_embeddings.weight"]] == 0.0
    assert decays[names["text.embeddings.word_embeddings.weight"]] == 0.3
    assert decays[names["vision.pool.q.weight"]] == 0.3


def test_a_text_tower_has_its_share_of_the_rate() -> None:
    model = nn.ModuleDict({"vision": nn.Linear(3, 4), "text": nn.Linear(3, 4)})
    optimizer = make_optimizer(model, Optim(lr=0.5, text_lr_ratio=0.1))
    for rate in (0.5, 0.2):
        set_learning_rate(optimizer, rate)
        rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        assert {rates[p] for p in model["vision"].parameters()} == {rate}
        assert {rates[p] for p in model["text"].parameters()} == {rate * 0.1}
