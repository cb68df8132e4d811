"""The vision tower of a trained model, for use: the same arithmetic for a trunk that was trained and for a locked one.

    pixels [b, 3, S, S] -> trunk -> tokens -> (float16) -> (standardise) -> pool -> head -> unit vectors, float32 [b, D]

Training has two shapes of this tower (`nev.models.vision`, `nev.models.frozen`). Exports and `nev.load` have this one, with one
set of names: `trunk.`, `pool.`, `head.`, `statistics`.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nev.config.model import Vision
from nev.models.frozen import LEAST_DEVIATION, FrozenTower
from nev.models.heads import build_head
from nev.models.pools import build_pool
from nev.models.trunk import build_trunk
from nev.models.trunk_trace import encode_images
from nev.models.vision import VisionTower


class ImageEncoder(nn.Module):
    """Normalised pixels to unit vectors, in eval mode whatever `train` says. `build_image_encoder` builds one.

    trunk: timm model.
    pool: tokens to one vector.
    head: that vector to the width of the embedding; Identity where nothing is left to do.
    statistics: float32 [2, F], mean and standard deviation that standardise a locked trunk's features; None for no change.
    config: the section `vision`.
    """

    def __init__(self, trunk: Any, pool: nn.Module, head: nn.Module, statistics: Tensor | None, config: Any) -> None:
        super().__init__()
        self.trunk, self.pool, self.head = trunk, pool, head
        self.statistics: Tensor | None
        self.register_buffer("statistics", statistics)
        self.name, self.pool_name, self.locked = config.trunk, config.pool, config.lock == "trunk"
        self.pool_first, self.bf16 = config.keep == "pooled", self.locked and config.precision == "bf16"
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """float [b, 3, S, S], normalised -> float32 [b, D] of unit length."""
        vectors: Tensor = F.normalize(self.head(self.pooled(images)).float(), dim=-1)
        return vectors

    def pooled(self, images: Tensor) -> Tensor:
        """float [b, 3, S, S], normalised -> the vector that the head takes, [b, F]."""
        if not self.locked:
            return self.pool(encode_images(self.trunk, images, self.pool_name, self.name))  # type: ignore[no-any-return]
        with torch.autocast(images.device.type.replace("meta", "cpu"), torch.bfloat16, enabled=self.bf16):
            features = encode_images(self.trunk, images, self.pool_name, self.name)
            features = self.pool(features) if self.pool_first else features
        features = features.half().to(images.dtype)  # as sidecars store them
        if self.statistics is not None:
            mean, deviation = self.statistics.unbind()
            features = torch.where(deviation > LEAST_DEVIATION, (features - mean) / deviation, 0.0)
        return features if self.pool_first else self.pool(features)


def build_image_encoder(config: Vision, image_size: int, width: int) -> ImageEncoder:
    """Build the encoder that `config` describes, with random weights. No file is read, and no hub is contacted.

    image_size: S, side of the pictures, in pixels. width: D, of the embedding.
    Raises ConfigError as `build_trunk` and `build_pool`.
    """
    encoder = assemble_image_encoder(config.model_copy(update={"pretrained": False}), image_size, width)
    if config.lock:  # as `load_frozen_trunk`: another order in memory would round features otherwise
        encoder.trunk.to(memory_format=torch.channels_last)
    return encoder


def assemble_image_encoder(config: Any, image_size: int, width: int) -> ImageEncoder:
    """As `build_image_encoder`, for the fields of the section `vision` in any object. `pretrained` must be false."""
    trunk = build_trunk(config, image_size)
    pool, features = build_pool(config, trunk)
    statistics = None
    if config.lock and config.standardise:
        stored = features if config.keep == "pooled" else int(trunk.num_features)
        statistics = torch.stack([torch.zeros(stored), torch.ones(stored)])
    return ImageEncoder(trunk, pool, build_head(config, features, width), statistics, config)


def make_image_encoder(tower: VisionTower | FrozenTower) -> ImageEncoder:
    """The encoder that computes what a training tower computes in eval mode. Its layers are the tower's own."""
    if isinstance(tower, VisionTower):
        return ImageEncoder(tower.trunk, tower.pool, tower.head, None, tower.config)
    trunk, head = tower.trunk, tower.head
    pool = trunk.pool if trunk.config.keep == "pooled" else head.pool
    return ImageEncoder(trunk.trunk, pool, head.head, head.statistics, trunk.config)
