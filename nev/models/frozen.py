"""A locked trunk, and the layers that are trained behind it (SAIL, arXiv 2412.04616; LiT with both towers locked).

    pixels [b, 3, S, S] -> FrozenTrunk -> features, float16 [b, F] or [b, T, F] -> FeatureHead -> unit vectors [b, D]

Features from a sidecar and from the trunk in the training loop are rounded to float16 alike, so both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from nev.common.hashing import hash_recipe
from nev.config.base import ConfigError
from nev.config.model import Vision
from nev.models.digests import weight_digests
from nev.models.heads import build_head
from nev.models.pools import build_pool
from nev.models.tower_weights import TRUNK, cut_prefix, read_tower_file
from nev.models.trunk import build_trunk, fit_trunk_weights
from nev.models.trunk_trace import encode_images
from nev.ops.onednn import use_onednn

LEAST_DEVIATION = 1e-6  # a feature that varies less over the training set is 0 when it is standardised


class FrozenTrunk(nn.Module):
    """Pixels to features, float16, without a graph, in eval mode whatever `train` says. `load_frozen_trunk` makes one.

    trunk: timm model.
    pool: tokens to one vector; Identity where all tokens are features.
    config: the section `vision`.
    image_size: S, side of the pictures, in pixels.
    """

    def __init__(self, trunk: Any, pool: nn.Module, config: Vision, image_size: int) -> None:
        super().__init__()
        self.trunk, self.pool, self.config, self.image_size = trunk, pool, config, image_size
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """float [b, 3, S, S] -> float16 [b, *shape]. Numbers beyond float16 become infinite."""
        kind = images.device.type.replace("meta", "cpu")  # autocast knows no meta device, on which shapes are computed
        # A caller's autocast must not reach the trunk: features are the same in sidecars, in the loop and in evaluation.
        with torch.autocast(kind, torch.bfloat16, enabled=self.config.precision == "bf16"):
            tokens = encode_images(self.trunk, images, self.config.pool, self.config.trunk)
            features: Tensor = self.pool(tokens)
        return features.half()

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of one picture's features: (F,), or (T, F) where tokens are features. One picture passes the trunk."""
        first = next(self.trunk.parameters())
        return tuple(self(first.new_zeros(1, 3, self.image_size, self.image_size)).shape[1:])

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what decides the features of given pixels: weights, architecture, size of the pictures, pool."""
        config = self.config
        return hash_recipe(
            {
                "weights": weight_digests(self.trunk),
                "trunk": config.trunk.split(".")[0],
                "trunk_args": config.trunk_args,
                "final_norm": config.final_norm,
                "image_size": self.image_size,
                "precision": config.precision,
                "pool": config.pool if config.keep == "pooled" else "tokens",
            }
        )


class FeatureHead(nn.Module):
    """Features of a locked trunk to unit vectors: all that is trained. `build_feature_head` builds one.

    pool: tokens to one vector; Identity where the features are one vector.
    head: that vector to the text tower's width.
    statistics: float32 [2, F], mean and standard deviation of the features, which standardise them; None for no change.
    width: D, width of the embedding.
    """

    def __init__(self, pool: nn.Module, head: nn.Module, statistics: Tensor | None, width: int) -> None:
        super().__init__()
        self.pool, self.head, self.width = pool, head, width
        self.statistics: Tensor | None
        self.register_buffer("statistics", statistics)

    def forward(self, features: Tensor) -> Tensor:
        """float [b, F] or [b, T, F] -> float32 [b, D] of unit length."""
        x = features.float()
        if self.statistics is not None:
            mean, deviation = self.statistics.unbind()
            x = torch.where(deviation > LEAST_DEVIATION, (x - mean) / deviation, 0.0)
        return F.normalize(self.head(self.pool(x)).float(), dim=-1)


class FrozenTower(nn.Module):
    """A locked trunk and its head, as one tower: float [b, 3, S, S] -> float32 [b, D] of unit length."""

    def __init__(self, trunk: FrozenTrunk, head: FeatureHead) -> None:
        super().__init__()
        self.trunk, self.head, self.width = trunk, head, head.width

    def forward(self, images: Tensor) -> Tensor:
        """float [b, 3, S, S] -> float32 [b, D] of unit length."""
        vectors: Tensor = self.head(self.trunk(images))
        return vectors


def load_frozen_trunk(
    config: Vision, image_size: int, state: dict[str, Tensor] | None = None, device: torch.device | str = "cpu"
) -> FrozenTrunk:
    """Load the trunk that `config` names, for pictures of `image_size` pixels: fp32, eval mode, no gradients.

    state: the trunk's weights by timm's names. None: those that `config` names.
    Raises ConfigError for a trunk that cannot be built, and for weights that cannot be fetched or do not fit.
    """
    settings = config if state is None else config.model_copy(update={"pretrained": False})
    trunk = build_trunk(settings, image_size)
    pool = build_pool(config, trunk)[0] if config.keep == "pooled" else nn.Identity()
    if state is None and config.weights:
        weights = read_tower_file(config.weights)
        state = cut_prefix(TRUNK, weights.state) if weights.whole else weights.state
    if state is not None:
        trunk.load_state_dict(fit_trunk_weights(trunk, state, config))
    use_onednn(trunk)
    trunk.to(memory_format=torch.channels_last)
    return FrozenTrunk(trunk, pool, config, image_size).to(device)


def load_same_trunk(config: Vision, image_size: int, fingerprint: str) -> FrozenTrunk:
    """Load the trunk as the driver has it. Raises ConfigError where this node has another one."""
    trunk = load_frozen_trunk(config, image_size)
    if trunk.fingerprint != fingerprint:
        raise ConfigError(
            f"vision.trunk {config.trunk!r}: this node's weights are not the driver's. Install the same everywhere."
        )
    return trunk


def build_feature_head(
    config: Vision, image_size: int, shape: Sequence[int], width: int, statistics: NDArray[np.float32] | None = None
) -> FeatureHead:
    """Build the layers behind a locked trunk, with random weights. No weight of the trunk is made.

    shape: of one picture's features, (F,) or (T, F).
    width: D, of the text vectors.
    statistics: float32 [2, F], for `vision.standardise`. None: zeros and ones, which a checkpoint replaces.
    Raises ConfigError for a pool that the trunk cannot feed.
    """
    features = shape[-1]
    pool: nn.Module = nn.Identity()
    if config.keep == "tokens":
        with torch.device("meta"):
            trunk = build_trunk(config.model_copy(update={"pretrained": False}), image_size)
        pool, features = build_pool(config, trunk)
    made = None
    if config.standardise:
        made = torch.stack([torch.zeros(shape[-1]), torch.ones(shape[-1])])
        made = made if statistics is None else torch.from_numpy(statistics).to(made.device)
    head = FeatureHead(pool, build_head(config, features, width), made, width)
    use_onednn(head)
    return head


def read_head_weights(config: Vision, image_size: int, shape: Sequence[int], width: int) -> dict[str, Tensor] | None:
    """Weights of the layers behind a locked trunk from the whole tower in `config.weights`, with the statistics of its features.

    None where `weights` has a trunk alone, or other layers behind it than `build_feature_head` builds.
    """
    weights = read_tower_file(config.weights) if config.weights else None
    if weights is None or not weights.whole:
        return None
    with torch.device("meta"):
        head = build_feature_head(config, image_size, shape, width)
    state = {name: tensor for name, tensor in weights.state.items() if not name.startswith(TRUNK)}
    there, here = ({name: tensor.shape for name, tensor in side.items()} for side in (state, head.state_dict()))
    return state if there == here else None


def describe_features(config: Vision, image_size: int) -> tuple[int, ...]:
    """Shape of one picture's features, (F,) or (T, F), without a weight of the trunk."""
    with torch.device("meta"):
        trunk = build_trunk(config.model_copy(update={"pretrained": False}), image_size)
        pool = build_pool(config, trunk)[0] if config.keep == "pooled" else nn.Identity()
        return FrozenTrunk(trunk, pool, config, image_size).shape


def check_head_memory(config: Vision, image_size: int, shape: Sequence[int], width: int, memory: int) -> None:
    """Raise ConfigError where the weights of the head, their gradients and moments are more than `memory` bytes."""
    with torch.device("meta"):
        head = build_feature_head(config, image_size, shape, width)
    needed = 4 * sum(parameter.nbytes for parameter in head.parameters())
    if needed > memory:
        raise ConfigError(
            f"vision.head: its weights, gradients and AdamW's moments take {needed / 2**30:,.1f} GiB, and this machine has "
            f"{memory / 2**30:,.1f} GiB: lower vision.head_hidden (or vision.pool_hidden), or submit the run to a cluster"
        )
