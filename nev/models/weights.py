"""Reads weights from a file that anybody may have written: tensors only, no pickled code."""

from __future__ import annotations

from pathlib import Path

import timm.models
from torch import Tensor

from nev.config.base import ConfigError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict in `path` to the CPU: a .safetensors file, or a PyTorch file (with `weights_only=True`).

    timm's reader removes the wrappers of usual training checkpoints (`state_dict`, `model`, `module.`).
    Raises ConfigError for a file that is absent, of another kind or damaged, or that holds more than tensors and plain values.
    """
    file = Path(path).expanduser()
    if file.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: weights are read from files that end in {', '.join(SUFFIXES)}")
    if not file.is_file():
        raise ConfigError(f"{path}: no such file of weights")
    try:
        state = timm.models.load_state_dict(str(file), weights_only=True)
        bad = [name for name, value in state.items() if not isinstance(value, Tensor)]
    except Exception as error:  # safetensors, pickle, zip and I/O each raise their own
        raise ConfigError(f"{path}: not readable as weights: {error}") from error
    if bad or not state:
        raise ConfigError(
            f"{path}: not a state dict of tensors (entries that are none: {bad[:5] or 'the file is empty'})"
        )
    return dict(state)
