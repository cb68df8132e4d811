"""Checkpoints, read whole."""

from __future__ import annotations

from torch import Tensor

from nev.runs import checkpoint
from nev.runs.manifest import CheckpointState


def load_checkpoint(
    location: str,
) -> tuple[CheckpointState, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(state, the model's tensors, the optimiser's tensors, random states) of a checkpoint, checksums compared."""
    return *checkpoint.load_model(location), *checkpoint.load_training_state(location)
