"""Training steps over made-up images, each run in a process of its own: seconds, and how much memory they took at their peak."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from benchmarks.contestants.losses import Cost, resident_mib
from nev.config.experiment import Experiment
from nev.config.file import parse

SIZE, WIDTH = 32, 384
TRUNK = {"patch_size": 8, "embed_dim": 192, "depth": 12, "num_heads": 3}


def experiment(batch: int, part: int | None) -> Experiment:
    """A ViT-Ti of 17 tokens, trained on `batch` images a step, embedded `part` at a time."""
    raw: dict[str, Any] = {
        "name": "step",
        "data": {"train": "none", "image_size": SIZE, "block_rows": min(batch, 256)},
        "vision": {"trunk": "vit_tiny_patch16_224", "trunk_args": TRUNK},
        "optim": {"lr": 1e-4},
        "train": {"global_batch": batch, "micro_batch": part, "steps": 1, "precision": "fp32"},
    }
    return parse(Experiment, raw)


def cost(images: int, batch: int, part: int | None) -> Cost:
    """What training on `images` images costs, `batch` a step. mib: all that the run takes, its weights and images included."""
    return cost_of(experiment(batch, part), images // batch)


def cost_of(config: Experiment, steps: int) -> Cost:
    """The same of some steps of an experiment, on made-up images."""
    from nev.models.dual_encoder import DualEncoder
    from nev.models.precision import choose_precision
    from nev.models.vision import build_vision
    from nev.train.core.optim import make_optimizer
    from nev.train.core.step import Batch, train_step
    from nev.train.core.vision_setup import apply_train_options

    batch, size, device = config.train.global_batch, config.data.image_size, torch.device("cpu")
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    torch.manual_seed(0)
    vision = build_vision(config.vision, size, WIDTH)
    apply_train_options(vision, config.train)
    model = DualEncoder(vision, config.loss, bias=config.initial_bias).train()
    optimizer = make_optimizer(model, config.optim)
    given = Batch(
        torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8),
        normalize(torch.randn(batch, WIDTH)).half(),
        torch.ones(batch, dtype=torch.bool),
    )
    precision = choose_precision("fp32", device)
    begin = time.perf_counter()
    for _ in range(steps):
        train_step(model, optimizer, given, config, precision)
    return Cost(time.perf_counter() - begin, resident_mib("VmHWM") - before)
