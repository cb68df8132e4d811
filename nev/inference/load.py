"""Opens a model from wherever it lies: a run, a checkpoint, an exported folder, released weights, S3, or the hub.

What a folder holds is recognised by its files and the names of its tensors. No code from a folder or the hub runs, unless the
caller allows that of the text encoder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from nev.config.base import ConfigError
from nev.config.model import Text
from nev.config.model_spec import ModelError
from nev.inference.checkpoints import find_checkpoint, read_checkpoint
from nev.inference.folders import ChooseText, Opened, open_folder, open_remote
from nev.inference.model import Model
from nev.models.text import TextTower
from nev.ops.onednn import use_onednn
from nev.storage.files import filesystem, is_local, storage_errors_as
from nev.storage.hub import HUB_NAME, fetch_model


def load(
    location: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    text: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Open a model.

    location: a run (its best checkpoint), a checkpoint, a folder that `nev export` has written, a folder of the released
        nomic-embed-vision, each here or on `s3://`, or a name on the Hugging Face hub.
    device: `cpu`, `cuda`, `mps`, ... None: a GPU where there is one.
    text: another place of the text encoder than the model names: a folder, a name on the hub, or a pip package. It has to be the
        same encoder. A checkpoint whose text tower was trained needs the encoder as it was before training.
    revision: branch, tag or commit on the hub. None: the default branch.
    trust_remote_code: permission to run Python code from the text encoder's repository. Read that code first.
    Raises ModelError, CheckpointError or StorageError for what is no model, is damaged, or cannot be read, and ModelError for a
    device that this machine does not have.
    """
    where = os.fspath(location)
    where = where.rstrip("/") or where
    place = choose_device(device)
    with _as_model_error():
        choose = partial(_choose_text, text, trust_remote_code)
        spec, encoder, load_tower = _open(where, revision, choose, trust_remote_code)
    use_onednn(encoder)
    return Model(where, spec, encoder.to(place), partial(_load_tower, load_tower), place)


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """A device that is there. None: a GPU of NVIDIA or Apple where there is one, else the CPU. Raises ModelError."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise ModelError(f"device {str(device)!r}: {reason}. Give a device of this machine: cpu, cuda, mps") from error
    return place


@contextmanager
def _as_model_error() -> Iterator[None]:
    """Turn the errors of configs, the caller's or the model's, into ModelError."""
    try:
        yield
    except ConfigError as error:
        elsewhere = ". Another place of the same encoder: nev.load(..., text=...), or nev export --text-encoder"
        hint = elsewhere if str(error).startswith("text.") else ""
        raise ModelError(f"{error}{hint}") from error


def _load_tower(load_tower: Callable[[], TextTower]) -> TextTower:
    with _as_model_error():
        return load_tower()


def _choose_text(encoder: str | None, trust: bool, text: Text) -> Text:
    """The section `text` with the caller's choice of the encoder, and of trust in its code."""
    changes = {"encoder": encoder, "revision": None} if encoder else {}
    return text.model_copy(update={**changes, "trust_remote_code": trust})


def _open(where: str, revision: str | None, choose: ChooseText, code: bool) -> Opened:
    """code: whether the Python code of a text encoder in a model on the hub is fetched, too."""
    if not where.strip() or ("://" in where and not where.startswith("s3://")):
        raise ModelError(f"{where!r}: give a folder, s3://BUCKET/PREFIX, or a name on the Hugging Face hub")
    fs, path = filesystem(where)
    if revision and (not is_local(fs) or Path(path).exists()):
        raise ModelError(
            f"revision {revision!r} is for a name on the hub, and {where} is a place here or on S3: leave it out"
        )
    with storage_errors_as(where, "read"):
        if fs.exists(f"{path}/state.json"):
            return read_checkpoint(where, choose)
        if fs.exists(f"{path}/checkpoints"):
            return read_checkpoint(find_checkpoint(where), choose)
    if not is_local(fs):
        return open_remote(where, choose)
    if Path(path).is_dir():
        return open_folder(Path(path), where, choose)
    if Path(path).exists():
        raise ModelError(f"{where} is a file: give the folder that it lies in")
    if not HUB_NAME.fullmatch(where):
        raise ModelError(f"{where}: no such folder")
    return open_folder(fetch_model(where, revision, code), where, choose)
