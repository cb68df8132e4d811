"""Options of a run for its vision tower: activation checkpointing (less memory, more work) and compilation."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from nev.config.base import ConfigError
from nev.config.train import Train
from nev.models.frozen import FeatureHead
from nev.models.vision import VisionTower


def apply_train_options(vision: VisionTower | FeatureHead, config: Train, backend: str = "inductor") -> None:
    """Apply `train.activation_checkpointing`, and `train.compile`, which compiles the tower at its first call.

    backend: torch.compile's.
    Without FSDP, which takes no such weights, convolutions get weights in channels-last format: 6 to 8 % of a step of ConvNeXt,
    ResNet or RegNet on two cores, nothing for a ViT. Parameters and their names stay. The result stays, to rounding.
    Raises ConfigError for a trunk that timm cannot checkpoint.
    """
    if isinstance(vision, VisionTower) and not config.fsdp:
        vision.trunk.to(memory_format=torch.channels_last)
    if isinstance(vision, VisionTower) and config.activation_checkpointing:
        enable_activation_checkpointing(vision)
    if config.compile:
        # Random numbers of eager mode: GradCache embeds a part twice, in two graphs, whose dropout must be the same.
        options: dict[str, Any] = {"options": {"fallback_random": True}} if backend == "inductor" else {}
        vision.compile(backend=backend, dynamic=False, **options)


def enable_activation_checkpointing(vision: VisionTower) -> None:
    """Keep only the input of each block of the trunk; compute the rest again in the backward, with the same dropout.

    Chen et al. 2016, arXiv 1604.06174: one more forward, and the activations of one block in memory instead of all.
    """
    try:
        vision.trunk.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise ConfigError(
            f"train.activation_checkpointing: timm's {vision.config.trunk} does not support it. Choose another trunk, or a "
            "smaller train.micro_batch."
        ) from error


def uncompiled() -> AbstractContextManager[object]:
    """A context in which compiled towers run in eager mode. Validation has other batch sizes, and each would be compiled."""
    context: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return context
