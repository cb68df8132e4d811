"""A small sweep over the experiment of `tiny`."""

from __future__ import annotations

from typing import Any

from nev.config.file import parse
from nev.sweep.config import Sweep


def raw(base: str, **settings: object) -> dict[str, Any]:
    return {
        "name": "sizes",
        "base": base,
        "axes": {"train.global_batch": [32, 64, 128]},
        "seeds": [0, 1],
        "samples": 640,
        "metrics": ["zero_shot/top1"],
        **settings,
    }


def sweep(base: str, **settings: object) -> Sweep:
    return parse(Sweep, raw(base, **settings))
