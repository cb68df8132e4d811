"""What a run may trade for its vision tower: work for memory, and the time of a compilation for speed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from nev.config.base import ConfigError
from nev.config.experiment import Train
from nev.models.vision import VisionTower


def apply_train_options(vision: VisionTower, config: Train, backend: str = "inductor") -> None:
    """Let `vision` keep few activations (`train.activation_checkpointing`), and be compiled at its first call (`train.compile`).

    Its convolutions hold their weights as the pixels lie, channels last (FSDP takes no such weights): 6 to 8 % of a step of
    ConvNeXt, ResNet or RegNet on two cores, nothing of a ViT's. Parameters and their names stay, and so does the result, to
    rounding. Raises ConfigError for a trunk that timm cannot checkpoint. backend: torch.compile's.
    """
    if not config.fsdp:
        vision.trunk.to(memory_format=torch.channels_last)
    if config.activation_checkpointing:
        enable_activation_checkpointing(vision)
    if config.compile:
        # Eager random numbers: GradCache embeds a part of a batch twice, in two graphs, which must draw alike.
        options: dict[str, Any] = {"options": {"fallback_random": True}} if backend == "inductor" else {}
        vision.compile(backend=backend, dynamic=False, **options)


def enable_activation_checkpointing(vision: VisionTower) -> None:
    """Keep what goes into each block of the trunk, and compute the rest again in the backward, dropout as it was drawn.

    Chen et al. 2016, arXiv 1604.06174: one forward more, and the memory of one block instead of all.
    """
    try:
        vision.trunk.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise ConfigError(
            f"train.activation_checkpointing: timm's {vision.name} has no way to it. Choose another trunk, or a smaller "
            "train.micro_batch instead."
        ) from error


def uncompiled() -> AbstractContextManager[object]:
    """Inside, compiled towers run as they were written: validation has batches of other sizes, each a compilation."""
    context: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return context
