"""A small model of every module of timm under every pool: what works trains whole, and what does not is refused by a message."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.timm_trunks import FOREIGN, SMALL, Small, allowed_pools, print_table
from torch import Tensor, nn

from nev.config.base import ConfigError
from nev.config.model import Vision
from nev.models.pools import build_pool
from nev.models.trunk import build_trunk
from nev.models.vision import VisionTower, build_vision, check_vision

WIDTH = 24
HEAVY = ("inception_resnet_v2", "inception_v3", "inception_v4", "mobilenetv5", "mvitv2", "nasnet", "nextvit", "pnasnet")
PAGE = Path(__file__).parents[2] / "docs" / "trunks.md"
NO_CLASS_TOKEN = "reads the class token, and trunk .* has none"


def vision(small: Small, pool: str, **changes: Any) -> Vision:
    return Vision(**{"trunk": small.model, "trunk_args": small.args, "pool": pool, **changes})


def idle(tower: nn.Module, images: Tensor) -> list[str]:
    """Trainable parameters without a gradient after a backward. The vectors must have unit length."""
    tower.zero_grad(set_to_none=True)
    out = tower(images)
    assert out.shape == (2, WIDTH)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(2))
    (out * torch.randn_like(out)).sum().backward()
    return [name for name, weight in tower.named_parameters() if weight.requires_grad and weight.grad is None]


def test_the_table_has_every_module_of_timm() -> None:
    assert sorted(SMALL) == timm.list_modules()
    assert [module for module, small in SMALL.items() if small.model not in timm.list_models(module=module)] == []


def each(modules: Iterable[str]) -> list[Any]:
    return [pytest.param(module, marks=pytest.mark.slow) if module in HEAVY else module for module in modules]


@pytest.mark.parametrize("module", each(SMALL))
def test_every_pool_trains_every_parameter_or_is_refused(module: str) -> None:
    """The trunk is built once for its own pooling and once for its tokens, which all other pools share."""
    torch.manual_seed(0)
    small = SMALL[module]
    images = torch.randn(2, 3, small.size, small.size)
    assert idle(build_vision(vision(small, "own"), small.size, WIDTH), images) == []
    tokens = [pool for pool in small.pools if pool != "own"]
    if not tokens:
        with pytest.raises(ConfigError, match=r"gives a list, not tokens \[b, T, D\]: choose vision\.pool: own"):
            build_trunk(vision(small, "map"), small.size)
        return
    trunk = build_trunk(vision(small, tokens[0]), small.size)
    for pool in ("map", "mean", "cls", "cls+mean", "nomic"):
        config = vision(small, pool)
        if pool in tokens:
            made, width = build_pool(config, trunk)
            assert idle(VisionTower(trunk, made, nn.Linear(width, WIDTH), config, WIDTH), images) == [], pool
        else:
            reason = "gives its class token alone" if "cls" in tokens else NO_CLASS_TOKEN
            with pytest.raises(ConfigError, match=reason):
                build_pool(config, trunk)


@pytest.mark.parametrize("module", each(module for module, small in SMALL.items() if small.refused))
def test_a_size_that_a_trunk_does_not_take_is_refused_before_a_worker_meets_it(module: str) -> None:
    small = SMALL[module]
    assert small.refused
    with pytest.raises(ConfigError, match=rf"{small.model}.*{small.refused} x {small.refused} pixels"):
        check_vision(vision(small, small.pools[0]), small.refused, WIDTH)


@pytest.mark.parametrize("small", FOREIGN, ids=lambda small: small.model)
def test_other_models_of_these_modules(small: Small) -> None:
    """Other classes, tokens and arguments than those of the module's smallest model."""
    assert allowed_pools(small) == small.pools


def test_the_page_lists_what_is_true() -> None:
    assert print_table() in PAGE.read_text(encoding="utf-8")
