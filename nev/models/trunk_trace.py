"""What a trunk computes at one size of the pictures, found by one forward on shapes alone: no numbers, no memory, and for
EVA02-B/16 a fifth of a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nev.config.base import ConfigError


class Trace(NamedTuple):
    """What one forward of a trunk has shown.

    shape: of the tokens of a picture, (T, D), or with the pool `own` of its vector, (D,).
    idle: names of the parameters that no number of the output depends on.
    """

    shape: tuple[int, ...]
    idle: tuple[str, ...]


def encode_images(trunk: Any, images: Tensor, pool: str, name: str) -> Tensor:
    """float [b, 3, H, W] -> the trunk's tokens [b, T, D], or with the pool `own` its vector [b, D].

    A feature map becomes tokens row by row. Raises ConfigError for a trunk that gives something else. name: of the trunk.
    """
    if pool == "own":
        features = trunk(images)
        wanted, shape = 2, "a vector [b, D]"
    else:
        features = trunk.forward_features(images)
        wanted, shape = 3, "tokens [b, T, D]"
        if isinstance(features, Tensor) and features.ndim == 4:
            channels_last = str(getattr(trunk, "output_fmt", "NCHW")).endswith("NHWC")
            features = features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
    if not isinstance(features, Tensor) or features.ndim != wanted:
        given = tuple(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
        other = "another vision.pool" if pool == "own" else "vision.pool: own"
        raise ConfigError(f"vision.trunk {name!r} gives {given}, not {shape}: choose {other}, or another trunk")
    return features


def trace_trunk(trunk: Any, image_size: int, pool: str, name: str) -> Trace:
    """Run two pictures through a trunk in training mode, as shapes. The trunk does not change, random numbers included.

    Raises ConfigError where the trunk takes no pictures of this size, or gives something else than the pool needs.
    """
    # A caller may build without gradients, and under another default device.
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("meta"),
        torch.inference_mode(False),  # turns gradients on, too
        _without_numbers(trunk) as shapes,
    ):
        dtype = next((tensor.dtype for tensor in shapes.values() if tensor.requires_grad), torch.float32)
        images = torch.empty(2, 3, image_size, image_size, dtype=dtype)
        try:
            output = encode_images(trunk, images, pool, name)
        except ConfigError:
            raise
        except Exception as error:  # the code of a model of timm: each raises its own
            raise ConfigError(_refuse_size(trunk, image_size, name, error)) from error
    used = {id(tensor) for tensor in list_leaves(output)}
    return Trace(
        tuple(output.shape[1:]),
        tuple(name for name, weight in trunk.named_parameters() if id(shapes[weight]) not in used),
    )


@contextmanager
def _without_numbers(module: nn.Module) -> Iterator[dict[Tensor, Tensor]]:
    """Meanwhile each parameter and buffer is a tensor on the meta device: a mapping from the former to the latter.

    (`torch.func.functional_call` leaves tensors of the meta device behind where two modules hold the same third one, as CoaT's.)
    """
    tables: list[Any] = [table for part in module.modules() for table in (part._parameters, part._buffers)]
    before = [dict(table) for table in tables]
    shapes: dict[Tensor, Tensor] = {}
    try:
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None:
                    learns = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
                    empty = torch.empty_like(tensor, device="meta", requires_grad=learns)
                    table[name] = shapes.setdefault(tensor, empty)
        yield shapes
    finally:
        for table, tensors in zip(tables, before, strict=True):
            table.clear()  # a forward may have added to it
            table.update(tensors)


def list_leaves(output: Tensor) -> Iterator[Tensor]:
    """The tensors without a history that `output` was computed from."""
    seen: set[Any] = set()
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [before for before, _ in node.next_functions]


def _refuse_size(trunk: Any, image_size: int, name: str, error: Exception) -> str:
    published = (getattr(trunk, "pretrained_cfg", None) or {}).get("input_size")
    advice = f" (timm has it at {published[-1]})" if published else ""
    size = f"{image_size} x {image_size} pixels"
    return (
        f"vision.trunk {name!r} is not usable for pictures of {size}: {type(error).__name__}: {error}. "
        f"Choose another data.image_size{advice}, or another trunk"
    )
