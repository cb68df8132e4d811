"""FLOPs of an image, counted on tensors without memory: what a share of a GPU's peak is computed from."""

from __future__ import annotations

import torch

from nev.config.experiment import Experiment
from nev.models.vision import VisionTower
from nev.train.capacity import compute_shape, picture_shape


def count_flops(config: Experiment, text_width: int) -> float:
    """FLOPs of the trained vision layers' forward and backward for an image, 2 for a multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode

    vision = compute_shape(config, text_width)
    with torch.device("meta"):
        picture = torch.empty(1, *picture_shape(config))
    picture = picture.permute(0, 3, 1, 2) if isinstance(vision, VisionTower) else picture
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(vision(picture).sum())
    return float(counter.get_total_flops())


def model_flops(config: Experiment, text_width: int) -> float | None:
    """FLOPs of a step for an image; None where they are not known, or where a GPU's peak in bf16 says nothing.

    The count has the trained vision layers alone, so another tower that runs in the loop makes the FLOPs unknown.
    """
    locked_in_loop = config.vision.lock is not None and not config.vision.from_sidecars
    if config.text_online or locked_in_loop or not config.workers.gpus or config.train.precision == "fp32":
        return None
    try:
        return count_flops(config, text_width)
    except RuntimeError:  # a trunk that needs numbers: it trains, and its share of the peak is unknown
        return None
