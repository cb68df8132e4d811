"""The vision tower: a timm trunk that gives tokens, a pool, a head, unit vectors of the text tower's width.

    images [b, 3, H, W] -> trunk -> tokens [b, T, D] -> pool -> [b, D] -> (head) -> L2, fp32

The paper's tower (arXiv 2406.18587) is `eva02_base_patch14_224.mim_in22k` with 16 px patches, without its last norm,
under the pool `nomic`; its D is the text width, 768, and there is no head. `nev.models.frozen` has towers with a locked trunk.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nev.common.errors import first_few
from nev.config.base import ConfigError
from nev.config.model import Vision
from nev.models.heads import build_head
from nev.models.pools import build_pool
from nev.models.tower_check import check_numbers, check_shapes, is_small
from nev.models.tower_weights import TRUNK, read_tower_file
from nev.models.trunk import build_trunk, fit_trunk_weights, refuse_misfit
from nev.models.trunk_trace import encode_images
from nev.ops.onednn import use_onednn


class VisionTower(nn.Module):
    """Pixels to unit vectors. `build_vision` builds one.

    trunk: timm model.
    pool: tokens to one vector.
    head: that vector to the text tower's width; Identity where nothing is left to do.
    config: the section `vision`.
    width: width of the embedding.
    """

    def __init__(self, trunk: Any, pool: nn.Module, head: nn.Module, config: Vision, width: int) -> None:
        super().__init__()
        self.trunk, self.pool, self.head, self.config, self.width = trunk, pool, head, config, width

    def tokens(self, images: Tensor) -> Tensor:
        """float [b, 3, H, W] -> the trunk's output, by `encode_images`."""
        return encode_images(self.trunk, images, self.config.pool, self.config.trunk)

    def features(self, images: Tensor) -> Tensor:
        """float [b, 3, H, W] -> the embedding before its scaling to unit length, [b, width]."""
        vectors: Tensor = self.head(self.pool(self.tokens(images)))
        return vectors

    def forward(self, images: Tensor) -> Tensor:
        """float [b, 3, H, W] -> float32 [b, width] of unit length. The norm is computed in fp32, under autocast too."""
        return F.normalize(self.features(images).float(), dim=-1)


def build_vision(config: Vision, image_size: int, width: int) -> VisionTower:
    """Build the tower that `config` describes, for square images of `image_size` pixels and text vectors of width `width`.

    Weights are random, or timm's (`pretrained`, from the hub), or of the trunk from a file (`weights`: timm resamples position
    and patch embeddings to this size), or of the whole tower from a checkpoint, an export, or the released nomic-embed-vision. On
    CPUs where oneDNN is faster, linear layers compute through it (`onednn.use_onednn`), with the same parameters and names.

    Raises ConfigError for an unknown trunk or trunk argument (with close matches), for weights that do not fit, and for a pool
    that the trunk cannot feed.
    """
    tower = _assemble(config, image_size, width)
    if config.weights:
        tower.load_state_dict(read_tower_weights(tower, config), strict=False)  # checked when they were read
    use_onednn(tower)
    return tower


def check_vision(config: Vision, image_size: int, width: int, locked: bool = False) -> None:
    """Raise the errors of `build_vision` and of the first step, but in a second: no hub is contacted.

    Weights are made for a small tower alone: its forward and backward are tried with numbers (`nev.models.tower_check`). A
    larger tower is tried with shapes alone.

    locked: the tower will be locked. Then raise ConfigError for parameters that neither `weights` nor `pretrained` brings.
    Raises ConfigError, too, for parameters that no loss reaches, and for vectors or gradients that are not finite.
    """
    empty = config.model_copy(update={"pretrained": False})
    with torch.device("meta"):
        tower = _assemble(empty, image_size, width)
    names = [name for name, _ in tower.named_parameters()]
    trunk = {name for name in names if name.startswith(TRUNK)}
    weights = read_tower_weights(tower, config) if config.weights else {}
    loaded = weights.keys() if config.weights else trunk
    if locked and (rest := [name for name in names if name not in loaded]):
        source = "weights" if config.weights else "pretrained"
        raise ConfigError(
            f"lock: image would lock random weights: vision.{source} brings the trunk's alone, and the tower has "
            f"{first_few(rest)} besides. Give vision.weights a whole tower (a checkpoint of nev, or an export), or "
            "choose vision.pool: mean or cls on a trunk as wide as the texts."
        )
    check_shapes(tower, image_size, trained=not locked)
    if is_small(tower, image_size):
        with torch.random.fork_rng(devices=[]):
            tower = _assemble(empty, image_size, width)
        tower.load_state_dict(weights, strict=False)  # checked when they were read
        check_numbers(tower, image_size, trained=not locked)


def _assemble(config: Vision, image_size: int, width: int) -> VisionTower:
    """The tower, before the weights of a file are loaded."""
    trunk = build_trunk(config, image_size)
    pool, pooled_width = build_pool(config, trunk)
    return VisionTower(trunk, pool, build_head(config, pooled_width, width), config, width)


def read_tower_weights(tower: VisionTower, config: Vision) -> dict[str, Tensor]:
    """Read the weights of the trunk, or of the whole tower, from `config.weights`, by the tower's names.

    Raises ConfigError unless every parameter of the trunk (or tower) is there, and nothing more but the trunk's classifier.
    """
    weights = read_tower_file(str(config.weights))
    if weights.whole:
        refuse_misfit(weights.state, tower.state_dict(), f"the tower of this experiment ({config.trunk!r})", config)
        return weights.state
    fitted = fit_trunk_weights(tower.trunk, weights.state, config)
    return {TRUNK + name: tensor for name, tensor in fitted.items()}


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [b, H, W, 3] -> float32 [b, 3, H, W] = (images / 255 - mean) / std, on the images' device.

    mean, std: one number per channel, in 0 to 1.

    Pixels become floats nowhere else: they travel to the device as uint8. The result keeps the memory order of the pixels
    (channels last). Raises ValueError for another shape or dtype.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"normalise needs uint8 [b, H, W, 3], not {images.dtype} {tuple(images.shape)}")
    offset, scale = _channels(tuple(mean), tuple(std), images.device)
    return torch.addcmul(offset, images.permute(0, 3, 1, 2), scale)


def as_input(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The input of a tower: pixels, uint8 [b, S, S, 3], are normalised; features of a locked trunk, float16, stay as they are."""
    return normalise(images, mean, std) if images.dtype == torch.uint8 else images


@functools.lru_cache(maxsize=8)
def _channels(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Offset and scale, float32 [3, 1, 1] each. Cached, because a copy to the device waits for the device."""
    offset = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).view(3, 1, 1)
    scale = torch.tensor([1 / (255 * s) for s in std], device=device).view(3, 1, 1)
    return offset, scale
