"""A vision tower is tried before a run begins: forward and backward, so that no worker meets what could be known before.

Shapes are tried for every tower, on the meta device. Numbers are tried where that takes a second at most. (Forward and backward
of EVA02-B/16 for two pictures take five seconds on two cores of a slow server, and random weights two more.) A larger tower has
its first numbers in its first step, which the guards watch. (`tower` is a `VisionTower` here; its module imports this one.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nev.common.errors import first_few
from nev.config.base import ConfigError
from nev.models.trunk_trace import list_leaves
from nev.ops.threads import torch_threads

MOST_WEIGHTS = 12 * 10**6  # to draw random numbers for: half a second
# Of a forward of two pictures: with its backward a quarter of a second on a free core, a second on a busy core.
MOST_FLOPS = 2 * 10**9


def is_small(tower: Any, image_size: int) -> bool:
    """Whether numbers of the tower are tried. tower: on the meta device."""
    if sum(weight.numel() for weight in tower.parameters()) > MOST_WEIGHTS:
        return False
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        _embed(tower, torch.empty(2, 3, image_size, image_size, device="meta"))
    return bool(counter.get_total_flops() <= MOST_FLOPS)


def check_shapes(tower: Any, image_size: int, trained: bool = True) -> None:
    """Run two pictures through a tower on the meta device.

    trained: the tower is trained. Then raise ConfigError for trainable parameters that no loss reaches.
    Raises ConfigError for what the tower raises, and for an output that is not one vector a picture.
    """
    with torch.enable_grad():
        vectors = _embed(tower, torch.empty(2, 3, image_size, image_size, device="meta"))
    reached = {id(tensor) for tensor in list_leaves(vectors)}
    idle = [name for name, weight in tower.named_parameters() if weight.requires_grad and id(weight) not in reached]
    if trained and idle:
        raise ConfigError(
            f"{_name(tower)} has parameters that no loss reaches: {first_few(idle)}. Choose another vision.pool, other "
            "vision.trunk_args, or another trunk"
        )


def check_numbers(tower: Any, image_size: int, trained: bool = True) -> None:
    """Run two pictures of random pixels through a tower, and a random gradient back. Random numbers elsewhere stay as they are.

    trained: the tower is trained. Else there is no backward.
    Raises ConfigError for what the tower raises, and for vectors or gradients that are not finite.
    """
    # On one thread: threads wait for each other in a loop where other processes have the cores.
    with torch_threads(1), torch.random.fork_rng(devices=[]), torch.set_grad_enabled(trained):
        torch.manual_seed(0)
        vectors = _embed(tower, torch.randn(2, 3, image_size, image_size))
        _refuse_infinite(tower, image_size, {"its vectors": vectors})
        if trained:
            torch.autograd.backward(vectors, torch.randn_like(vectors))
    gradients = {f"the gradient of {name}": weight.grad for name, weight in tower.named_parameters()}
    _refuse_infinite(tower, image_size, {name: grad for name, grad in gradients.items() if grad is not None})


def _embed(tower: Any, images: Tensor) -> Tensor:
    size = images.shape[-1]
    try:
        vectors: Tensor = tower(images)
    except ConfigError:
        raise
    except Exception as error:  # the code of a model of timm: each raises its own
        raise ConfigError(
            f"{_name(tower)} cannot embed pictures of {size} x {size} pixels: {type(error).__name__}: {error}. Choose another "
            "data.image_size, another vision.pool, or another trunk"
        ) from error
    if vectors.shape != (2, tower.width):
        raise ConfigError(
            f"{_name(tower)} gives {tuple(vectors.shape)} for two pictures of {size} x {size} pixels, and not "
            f"(2, {tower.width}): choose another vision.pool, or another trunk"
        )
    return vectors


def _refuse_infinite(tower: Any, image_size: int, tensors: dict[str, Tensor]) -> None:
    if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        source = f"look at vision.weights {tower.config.weights}" if tower.config.weights else "choose another trunk"
        raise ConfigError(
            f"{_name(tower)} at {image_size} x {image_size} pixels: not finite are {first_few(wrong)}, of random "
            f"pixels: {source}, or another data.image_size"
        )


def _name(tower: Any) -> str:
    return f"vision.trunk {tower.config.trunk!r} with pool {tower.config.pool!r}"
