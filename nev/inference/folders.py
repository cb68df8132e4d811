"""A folder of files as a model: an export of nev, or the released nomic-embed-vision; here, or on S3."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from nev.common.errors import first_few
from nev.config.base import ConfigError
from nev.config.model import Text
from nev.config.model_spec import BESIDE, SPEC_FILE, ModelError, ModelSpec, find_inside, read_spec
from nev.inference.released import CARD, CONFIG, FIRST, LATEST, PROCESSOR, find_released, find_version, read_released
from nev.models.image_encoder import ImageEncoder, build_image_encoder
from nev.models.nomic_text import is_released_config
from nev.models.text import TextTower, load_text
from nev.models.tower_weights import read_exported_weights
from nev.models.weights import FOLDER_FILES
from nev.storage.files import join, list_files, local_copy, storage_errors_as

ChooseText = Callable[[Text], Text]
# What a model is, its vision tower on the CPU, and a function that loads its text tower.
Opened = tuple[ModelSpec, ImageEncoder, Callable[[], TextTower]]


def open_folder(folder: Path, where: str, choose: ChooseText) -> Opened:
    """Open a local folder. where: its location, as the caller named it. choose: the caller's changes of the section `text`.

    Raises ModelError for what is no model, is not whole, or is damaged.
    """
    name = where.rpartition("/")[2]
    released = find_released(folder)
    if (folder / SPEC_FILE).is_file():
        spec = read_spec(folder)
        encoder = read_released(released, name)[1] if released else read_exported(folder, spec)
    elif released:
        spec, encoder = read_released(released, name)
        if find_version(folder, name) is None:
            warnings.warn(
                f"{where} is taken for {LATEST}, since no name there tells {FIRST} from {LATEST}. They have different text "
                "encoders. Name the folder as the published model, or say in its config.json, as _name_or_path, which one it is",
                stacklevel=2,
            )
    else:
        raise ModelError(f"{where} is no model of nev: {_describe(path.name for path in folder.iterdir())}")
    text = choose(spec.text)
    if _lies_beside(text, spec):
        text = text.model_copy(update={"encoder": str(find_inside(folder, text.encoder))})
    return spec, encoder, partial(_load_text, text, spec)


def open_remote(where: str, choose: ChooseText) -> Opened:
    """Open a folder on S3. As `open_folder`. Files are copied for as long as they are read, and only those that are needed.

    A text encoder in the folder is loaded at once, any other one when the first sentence comes.
    """
    with storage_errors_as(where, "listed"):
        names = list_files(where)
    if not names:
        raise ModelError(f"{where}: nothing is there")
    needed, beside = {CONFIG, PROCESSOR, CARD}, False
    if SPEC_FILE in names:
        with _copy_of(where, [SPEC_FILE]) as folder:
            spec = read_spec(folder)
        beside = _lies_beside(choose(spec.text), spec)
        needed |= {SPEC_FILE, *(spec.weights or FOLDER_FILES)}
    elif _is_released(where, names):
        needed |= set(FOLDER_FILES)
    else:
        raise ModelError(f"{where} is no model of nev: {_describe({name.split('/')[0] for name in names})}")
    text = spec.text.encoder.removeprefix(BESIDE) + "/" if beside else None
    files = [name for name in names if name in needed or (text and name.startswith(text))]
    with _copy_of(where, files) as folder:
        opened = open_folder(folder, where, choose)
        if not beside:
            return opened
        tower = replace(opened[2](), name=join(where, spec.text.encoder.removeprefix(BESIDE)))
    return opened[0], opened[1], lambda: tower


@contextmanager
def _copy_of(where: str, names: list[str]) -> Iterator[Path]:
    """A local folder with files of a folder on S3, which is removed at the end. Errors name the place on S3."""
    with local_copy(where, names) as folder:
        try:
            yield folder
        except (ModelError, ConfigError) as error:
            raise type(error)(str(error).replace(str(folder), where)) from error


def _is_released(where: str, names: list[str]) -> bool:
    """Whether the config.json on S3 is of the released layout. Its weights, which may be large, are not read."""
    if CONFIG not in names:
        return False
    with _copy_of(where, [CONFIG]) as folder:
        try:
            raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{where}/{CONFIG}: damaged ({error}). Copy the model again.") from error
    return isinstance(raw, dict) and is_released_config(raw)


def _lies_beside(text: Text, spec: ModelSpec) -> bool:
    """Whether the text encoder is the one in the model's folder. text: with the caller's changes."""
    return text.encoder.startswith(BESIDE) and text.encoder == spec.text.encoder


def _describe(names: Iterable[str]) -> str:
    """What a folder without a model has. names: of its files and folders."""
    files = sorted(names)
    if not files:
        return "the folder is empty"
    if steps := [name for name in files if name.startswith("step-")]:
        return f"it has {first_few(steps)}: give one of these checkpoints, or the run above"
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
    tower = load_text(text)
    if tower.width != spec.width or spec.text_fingerprint not in (None, tower.fingerprint):
        raise ModelError(
            f"{text.encoder} is not the text encoder that {spec.name} was trained against: its vectors would not be in the same "
            "space"
        )
    if spec.text_fingerprint is None and text.encoder != spec.text.encoder:
        warnings.warn(
            f"{text.encoder} stands for {spec.text.encoder}. Nothing but their width could be compared, since {spec.name} has no "
            "fingerprint of its text encoder",
            stacklevel=2,
        )
    return tower
