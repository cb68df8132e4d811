"""Small models and batches, for the tests of a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from nev.config.experiment import Experiment
from nev.config.file import parse
from nev.config.model import Loss, Vision
from nev.losses.contrastive import contrastive_loss
from nev.losses.gather import start_gather
from nev.losses.pairwise import LossOutput
from nev.models.dual_encoder import DualEncoder, Embedded
from nev.models.precision import Precision
from nev.models.vision import build_vision
from nev.train.core.gradcache import backward_in_parts
from nev.train.core.step import Batch, train_step

CPU = torch.device("cpu")


ROWS, SIZE, WIDTH = 24, 16, 12


TRUNK = {
    "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2,
    "drop_path_rate": 0.4, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "pos_drop_rate": 0.1,
}  # fmt: skip


VALID = torch.arange(ROWS) % 7 != 3


CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # the goal is 1e-6 in float64


def made(learn_scale: bool = True, kind: str = "softmax", **trunk: Any) -> DualEncoder:
    """trunk: arguments in the place of those of `TRUNK`."""
    torch.manual_seed(1)
    vision = build_vision(Vision(trunk="vit_tiny_patch16_224", trunk_args={**TRUNK, **trunk}, pool="map"), SIZE, WIDTH)
    loss = Loss(kind=kind, init_scale=10.0, learn_scale=learn_scale)
    return DualEncoder(vision, loss, bias=-10.0 if kind == "sigmoid" else None).double().train()


def batch(dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (ROWS, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
    text = normalize(torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64))
    return Batch(images, text.to(dtype), VALID)


def share_of(whole: Batch, rank: int, world: int) -> Batch:
    """A rank's share of a batch."""
    return Batch(*(part.chunk(world)[rank] for part in whole[:3]))


def embed(given: Batch) -> Callable[[nn.Module, slice], Embedded]:
    """In float64 throughout: VisionTower itself ends in float32."""

    def run(model: nn.Module, rows: slice) -> Embedded:
        pixels = given.images[rows].permute(0, 3, 1, 2).double() / 255
        if not isinstance(model, DualEncoder):
            found: Embedded = model(pixels)
            return found
        return (normalize(model.vision.features(pixels)),), (model.log_scale,)

    return run


def parts_of(part_rows: int, rows: int = ROWS) -> list[slice]:
    return [slice(start, start + part_rows) for start in range(0, rows, part_rows)]


def in_parts(model: nn.Module, given: Batch, part_rows: int) -> LossOutput:
    parts = parts_of(part_rows, len(given.images))
    return backward_in_parts(model, parts, embed(given), against(given), CPU)


def against(given: Batch) -> Callable[..., LossOutput]:
    """The loss of vectors with the texts of a batch."""
    texts = start_gather(given.text, given.valid)
    return lambda vectors, scalars: contrastive_loss(vectors[0], texts, scalars[0])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def experiment(**train: Any) -> Experiment:
    return parse(
        Experiment,
        {
            "name": "parts",
            "data": {"train": "nowhere", "image_size": SIZE, "block_rows": 4},
            "vision": {"trunk": "vit_tiny_patch16_224"},
            "optim": {"lr": 0.01},
            "train": {"global_batch": ROWS, "steps": 1, **train},
        },
    )


def poisoned(given: Batch) -> Batch:
    return given._replace(text=given.text.clone().index_fill_(0, torch.tensor([1]), math.nan))


FP32 = Precision(CPU, torch.float32)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, config: Experiment, given: Batch, count: int) -> Tensor:
    """(loss, correct, pairs, norm) of each of some steps on one batch, [count, 4]."""
    found = [train_step(model, optimizer, given, config, FP32) for _ in range(count)]
    return torch.tensor([[float(value) for value in one[:4]] for one in found])
