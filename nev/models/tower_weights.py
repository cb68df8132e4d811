"""Weights of a whole vision tower, from every file and folder that holds one, by one set of names.

    trunk.   pool.   head.   statistics       as `nev.models.image_encoder.ImageEncoder` has them

A checkpoint of nev has these names below `vision.`, the export `hf` below `encoder.`, other exports as their nev.json says, and
the released nomic-embed-vision has its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from nev.config.base import ConfigError
from nev.config.model_spec import SPEC_FILE, ModelError, find_inside, read_spec
from nev.models.nomic import RELEASED_MARK, from_released
from nev.models.weights import read_weights

TRUNK = "trunk."  # the names of a trunk's tensors begin so
PREFIXES = ("vision.", "encoder.")  # of a tower in a checkpoint, and in an export


class TowerWeights(NamedTuple):
    """Weights of a vision tower, or of a trunk alone.

    state: tensors. Of a tower by the names above; of a trunk by the names in the file.
    whole: whether it is a tower.
    """

    state: dict[str, Tensor]
    whole: bool


def read_tower_file(location: str) -> TowerWeights:
    """Read a file or folder of weights of a tower or trunk, to the CPU.

    Raises ConfigError for what `read_weights` cannot read, for half a tower in the released layout, and for an export that is
    not whole.
    """
    folder = Path(location).expanduser()
    try:
        if (folder / SPEC_FILE).is_file() and (files := read_spec(folder).weights):
            return TowerWeights(read_exported_weights(folder, files), whole=True)
    except ModelError as error:
        raise ConfigError(str(error)) from error
    state = read_weights(location)
    if RELEASED_MARK in state:
        try:
            return TowerWeights(from_released(state), whole=True)
        except ValueError as error:
            raise ConfigError(f"{location}: {error}") from error
    for prefix in PREFIXES:
        if any(name.startswith(prefix + TRUNK) for name in state):
            return TowerWeights(cut_prefix(prefix, state), whole=True)
    return TowerWeights(state, whole=False)


def read_exported_weights(folder: Path, files: Mapping[str, Mapping[str, str]]) -> dict[str, Tensor]:
    """The tower of an exported folder. files: `ModelSpec.weights`.

    Raises ModelError for a tensor that nev.json does not know, and for a file outside of the folder; ConfigError for a file that
    cannot be read.
    """
    state = dict[str, Tensor]()
    for file, names in files.items():
        for name, tensor in read_weights(find_inside(folder, file)).items():
            prefix = max((prefix for prefix in names if name.startswith(prefix)), key=len, default=None)
            if prefix is None:
                raise ModelError(f"{folder / file}: unknown tensor {name!r}")
            state[names[prefix] + name.removeprefix(prefix)] = tensor
    return state


def cut_prefix(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
