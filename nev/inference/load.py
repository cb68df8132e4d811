"""Opens a model from wherever it lies: a run, a checkpoint, an exported folder, released weights, S3, or the hub.

What a folder holds is recognised by its files and the names of its tensors. No code from a folder or the hub runs, unless the
caller allows that of the text encoder.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch

from nev.common.errors import first_few
from nev.config.base import ConfigError
from nev.config.model import Text
from nev.config.model_spec import BESIDE, SPEC_FILE, ModelError, ModelSpec, find_inside, read_spec
from nev.inference.checkpoints import ChooseText, Opened, find_checkpoint, read_checkpoint
from nev.inference.model import Model
from nev.inference.released import find_released, read_released
from nev.models.image_encoder import ImageEncoder, build_image_encoder
from nev.models.text import TextTower, load_text
from nev.models.tower_weights import read_exported_weights
from nev.ops.onednn import use_onednn
from nev.storage.files import filesystem, is_local, list_files, local_copy, storage_errors_as
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
        same encoder.
    revision: branch, tag or commit on the hub.
    trust_remote_code: permission to run Python code from the text encoder's repository. Read that code first.
    Raises ModelError, CheckpointError or StorageError for what is no model, is damaged, or cannot be read.
    """
    where = os.fspath(location)
    where = where.rstrip("/") or where
    place = torch.device(device) if device else choose_device()
    spec, encoder, load_tower = _open(where, revision, partial(_choose_text, text, trust_remote_code))
    use_onednn(encoder)
    return Model(where, spec, encoder.to(place), load_tower, place)


def choose_device() -> torch.device:
    """A GPU of NVIDIA or Apple where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _choose_text(encoder: str | None, trust: bool, text: Text) -> Text:
    """The section `text` with the caller's choice of the encoder, and of trust in its code."""
    changes = {"encoder": encoder, "revision": None} if encoder else {}
    return text.model_copy(update={**changes, "trust_remote_code": trust})


def _open(where: str, revision: str | None, choose: ChooseText) -> Opened:
    if not where.strip() or ("://" in where and not where.startswith("s3://")):
        raise ModelError(f"{where!r}: give a folder, s3://BUCKET/PREFIX, or a name on the Hugging Face hub")
    fs, path = filesystem(where)
    with storage_errors_as(where, "read"):
        if fs.exists(f"{path}/state.json"):
            return read_checkpoint(where, choose)
        if fs.exists(f"{path}/checkpoints"):
            return read_checkpoint(find_checkpoint(where), choose)
    if not is_local(fs):
        with storage_errors_as(where, "listed"):
            if not list_files(where):
                raise ModelError(f"{where}: nothing is there")
        with local_copy(where) as folder:
            spec, encoder, load_tower = _open_folder(folder, where, choose)
            tower = load_tower()  # now, since the copy is removed
        return spec, encoder, lambda: tower
    if Path(path).is_dir():
        return _open_folder(Path(path), where, choose)
    if Path(path).exists():
        raise ModelError(f"{where} is a file: give the folder that it lies in")
    if not HUB_NAME.fullmatch(where):
        raise ModelError(f"{where}: no such folder")
    return _open_folder(fetch_model(where, revision), where, choose)


def _open_folder(folder: Path, where: str, choose: ChooseText) -> Opened:
    name = where.rstrip("/").rpartition("/")[2]
    released = find_released(folder)
    if (folder / SPEC_FILE).is_file():
        spec = read_spec(folder)
        encoder = read_released(released, name)[1] if released else read_exported(folder, spec)
    elif released:
        spec, encoder = read_released(released, name)
    else:
        raise ModelError(f"{where} is no model of nev: {_describe(folder)}")
    text = choose(spec.text)
    if text.encoder.startswith(BESIDE) and text.encoder == spec.text.encoder:
        text = text.model_copy(update={"encoder": str(find_inside(folder, text.encoder))})
    return spec, encoder, partial(_load_text, text, spec)


def _describe(folder: Path) -> str:
    files = sorted(path.name for path in folder.iterdir())
    if not files:
        return "the folder is empty"
    if "config.json" in files and "modules.json" in files:
        return "it is a sentence-transformers model without nev.json. A text encoder goes into an experiment, as text.encoder"
    if "config.json" in files:
        return "it is a model of transformers. A text encoder goes into an experiment, as text.encoder"
    return (
        f"it has {first_few(files)}. Give a run, a checkpoint (RUN/checkpoints/step-...), a folder that `nev export` wrote, "
        "or the released nomic-embed-vision"
    )


def read_exported(folder: Path, spec: ModelSpec) -> ImageEncoder:
    """The encoder of an exported folder, on the CPU. Raises ModelError where files are missing or do not fit."""
    if not spec.weights:
        raise ModelError(
            f"{folder} has no PyTorch weights: it is an export for another runtime. Its README says how to call it; `nev export "
            "--format hf` writes what nev.load opens"
        )
    encoder = build_image_encoder(spec.vision, spec.image_size, spec.width)
    try:
        encoder.load_state_dict(read_exported_weights(folder, spec.weights))
    except (ConfigError, RuntimeError) as error:
        raise ModelError(f"{folder} is not whole: {error}. Copy or export the model again.") from error
    return encoder


def _load_text(text: Text, spec: ModelSpec) -> TextTower:
    """The text tower of an exported or released model. Raises ModelError where it is another one than the model's."""
    try:
        tower = load_text(text)
    except ConfigError as error:
        raise ModelError(f"{error}. Another place of the same encoder: nev.load(..., text=...)") from error
    if tower.width != spec.width or spec.text_fingerprint not in (None, tower.fingerprint):
        raise ModelError(
            f"{text.encoder} is not the text encoder that {spec.name} was trained against: its vectors would not be in the same "
            "space"
        )
    return tower
