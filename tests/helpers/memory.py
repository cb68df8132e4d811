"""One training step whose memory is measured."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import normalize

from nev.config.experiment import Experiment
from nev.config.file import parse
from nev.models.dual_encoder import DualEncoder
from nev.models.precision import choose_precision
from nev.models.vision import build_vision
from nev.train.capacity import LiveBytes
from nev.train.core.optim import make_optimizer
from nev.train.core.step import Batch, train_step
from nev.train.core.vision_setup import apply_train_options

CPU = torch.device("cpu")
WIDTH = 48
TRUNK = {"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2}


def experiment(batch: int = 64, **sections: Any) -> Experiment:
    raw: dict[str, Any] = {
        "name": "capacity",
        "data": {"train": "nowhere", "image_size": 32, "block_rows": 16},
        "vision": {"trunk": "vit_tiny_patch16_224", "trunk_args": TRUNK, "pool": "map"},
        "optim": {"lr": 1e-4},
        "train": {"global_batch": batch, "steps": 1, "precision": "fp32", **sections.pop("train", {})},
        **sections,
    }
    return parse(Experiment, raw)


def one_step(config: Experiment, live: LiveBytes | None = None) -> None:
    """Two training steps of a process alone; the second under `live`."""
    rows, size = config.train.global_batch, config.data.image_size
    vision = build_vision(config.vision, size, WIDTH)
    apply_train_options(vision, config.train)
    model = DualEncoder(vision, config.loss, bias=config.initial_bias).train()
    optimizer = make_optimizer(model, config.optim)
    given = Batch(
        torch.randint(0, 256, (rows, size, size, 3), dtype=torch.uint8),
        normalize(torch.randn(rows, WIDTH)).half(),
        torch.ones(rows, dtype=torch.bool),
    )
    precision = choose_precision(config.train.precision, CPU)
    train_step(model, optimizer, given, config, precision)
    if live:
        optimizer.zero_grad(set_to_none=True)
        state = [one for slots in optimizer.state.values() for one in slots.values()]
        for tensor in (*model.parameters(), *model.buffers(), *given[:3], *state):
            live.track(tensor)
        with live:
            train_step(model, optimizer, given, config, precision)


def real() -> Experiment:
    return experiment(
        batch=64,
        vision={"trunk": "vit_small_patch16_224", "pool": "map"},
        data={"train": "nowhere", "image_size": 224, "block_rows": 16},
        train={"micro_batch": 32},
    )
