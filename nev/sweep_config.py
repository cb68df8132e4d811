"""The schema of an ablation: one YAML file over a base experiment."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from nev.config_base import Positive, Section


class Sweep(Section):
    """An ablation: a base experiment, axes whose grid is tried with every seed, and a budget in samples seen.

    `lr_rule` scales optim.lr with train.global_batch against the base experiment's ("linear": Goyal et al. 2017; "sqrt":
    Krizhevsky 2014); warm-up covers the same number of samples at every batch size.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: str
    overrides: dict[str, Any] = Field(default_factory=dict)
    axes: dict[str, tuple[Any, ...]] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    samples: Positive
    metric: str
    lr_rule: Literal["constant", "sqrt", "linear"] = "constant"
    concurrent: Positive = 1
