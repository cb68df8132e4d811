"""Checkpoints that are complete or absent: safetensors and JSON, the manifest written last.

    <run>/checkpoints/step-00000500/  model.safetensors  optimizer.safetensors  rng.safetensors  state.json
                                      (trunk.safetensors, with train.save_trunk)

`state.json` holds the sha256 of the other files. It is written last, atomically (locally by a rename, on S3 by one PUT): a
folder without `state.json` is not a checkpoint. Nothing is pickled, so a load executes no code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from nev.runs.manifest import (
    FORMAT,
    CheckpointState,
    Damaged,
    Unreadable,
    checkpoint_location,
    read_manifest,
    remove_checkpoint,
)
from nev.storage.files import (
    filesystem,
    join,
    list_files,
    local_copy,
    remedy,
    storage_errors,
    storage_errors_as,
    write_atomic,
)

TRUNK_FILE = "trunk.safetensors"  # the weights of a locked trunk, by timm's names
VECTORS = "validation-"  # beginning of the name of a file with a validation's vectors
MEANS = "means"  # their means in that file
# Of the model and of its optimiser, by name; on the CPU, contiguous.
Trained = tuple[dict[str, Tensor], dict[str, Tensor]]


def save(
    run: str, state: CheckpointState, tensors: Trained, rng: dict[str, Tensor], beside: dict[str, bytes] | None = None
) -> str:
    """Write a checkpoint of a run, and return its location. Raises StorageError.

    run: path or URL of the run's folder.
    tensors: the model's tensors, and the optimiser's tensors.
    rng: random states by name, uint8 [n].
    beside: further files by name, with a checksum in `state.json` like the other files.
    """
    location = checkpoint_location(run, state.step)
    with storage_errors_as(location, "listed"):
        left = list_files(location)
    if left:
        remove_checkpoint(location)  # of a run that died while writing, or of an earlier start that reached this step
    digests = {}
    for name, data in _files(tensors, rng, beside or {}):
        digests[name] = hashlib.sha256(data).hexdigest()
        _write(location, name, data)
    manifest = {"format": FORMAT, **state.__dict__, "sha256": digests, "versions": {"torch": torch.__version__}}
    _write(location, "state.json", json.dumps(manifest, indent=1).encode())
    return location


def _files(tensors: Trained, rng: dict[str, Tensor], beside: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """The files of a checkpoint, one after another: all at once would take the memory of model and moments again."""
    model, optimizer = tensors
    yield "model.safetensors", safetensors.torch.save(model)
    yield "optimizer.safetensors", safetensors.torch.save(optimizer)
    yield "rng.safetensors", safetensors.torch.save(rng)
    yield from beside.items()


def _write(location: str, name: str, data: bytes) -> None:
    with storage_errors_as(join(location, name), "written"):
        write_atomic(join(location, name), data)


def load_model(location: str, verified: bool = False) -> tuple[CheckpointState, dict[str, Tensor]]:
    """The state of a checkpoint, and its model's tensors. Raises CheckpointError.

    verified: the caller has verified the checkpoint (`nev.runs.manifest.verify`), so no checksum is computed.
    """
    manifest = read_manifest(location)
    return _state(manifest), load_tensors(location, manifest, "model.safetensors", verified)


def load_training_state(location: str, verified: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The optimiser's tensors of a checkpoint, and its random states: what training alone needs. As `load_model`."""
    manifest = read_manifest(location)
    files = ("optimizer.safetensors", "rng.safetensors")
    moments, rng = (load_tensors(location, manifest, file, verified) for file in files)
    return moments, rng


def read_means(location: str) -> NDArray[np.float32] | None:
    """The means of a validation's unit vectors, of the pictures and of the captions: float32 [2, D].

    None for a checkpoint without a validation of captions in or beside training. Raises Damaged for a file that is cut.
    """
    with storage_errors_as(location, "listed"):
        names = [name for name in list_files(location) if name.startswith(VECTORS) and name.endswith(".safetensors")]
    for name in names:
        with local_copy(join(location, name)) as file:
            try:
                with safetensors.safe_open(file, "numpy") as tensors:
                    if MEANS in tensors.keys():  # noqa: SIM118  (no mapping)
                        means: NDArray[np.float32] = tensors.get_tensor(MEANS)
                        return means
            except safetensors.SafetensorError as error:
                raise Damaged(
                    f"{join(location, name)}: damaged ({error}). Put it back from a copy, or remove it: the model then ranks "
                    "pictures and texts by plain cosine"
                ) from error
    return None


def _state(manifest: dict[str, Any]) -> CheckpointState:
    return CheckpointState(**{key: manifest[key] for key in CheckpointState.__dataclass_fields__})


def load_tensors(location: str, manifest: dict[str, Any], file: str, verified: bool = False) -> dict[str, Tensor]:
    """The tensors in a file of a checkpoint. As `load_model`. manifest: `state.json` of the checkpoint."""
    fs, path = filesystem(join(location, file))
    try:
        data = fs.cat_file(path)
        if not verified and hashlib.sha256(data).hexdigest() != manifest["sha256"].get(file):
            raise Damaged(f"{location}/{file}: damaged (its sha256 is not the one in state.json)")
        return safetensors.torch.load(data)
    except FileNotFoundError as error:
        raise Damaged(f"{location}/{file}: damaged (the file is missing)") from error
    except safetensors.SafetensorError as error:
        raise Damaged(f"{location}/{file}: damaged ({error})") from error
    except storage_errors() as error:
        raise Unreadable(f"{location}/{file}: cannot be read ({error}). {remedy(error, '')}") from error
