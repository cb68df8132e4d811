"""A small experiment, which trains some ten steps a second on one core."""

from __future__ import annotations

import json
from pathlib import Path

from nev.config.experiment import Experiment
from nev.config.file import parse

# The settings of the fixture `reference_run`: runs that are compared with it take them, too.
REFERENCE = {"train__steps": 30, "train__eval_every": 10, "train__checkpoint_every": 10, "train__keep_last": 8}


def make_tiny(pictures: Path, folder: Path, **overrides: object) -> Experiment:
    """An experiment over the set of the fixture `pictures`, its runs in `folder`. overrides: `section__key=value`."""
    raw = {
        "name": "tiny",
        "output": str(folder),
        "data": {
            "train": str(pictures / "train"),
            "val": str(pictures / "val"),
            "image_size": 32,
            "block_rows": 32,
        },
        "vision": {
            "trunk": "vit_tiny_patch16_224",
            "trunk_args": {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
        },
        "optim": {"lr": 1e-3, "warmup_steps": 5},
        "train": {"global_batch": 64, "steps": 20, "log_every": 1, "checkpoint_every": 10},
        "eval": {
            "zero_shot": {"classes": str(pictures / "classes.txt"), "templates": ["a {}"]},
            "retrieval": True,
            "best": "zero_shot/top1",
        },
        "workers": {"count": 1, "threads": 1},
    }
    flat = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in overrides.items()]
    return parse(Experiment, raw, flat)
