"""The towers of a checkpoint, with the config of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.file import parse
from nev.config.paths import with_absolute_paths
from nev.models.text import TextTower, load_text
from nev.models.vision import VisionTower, build_vision
from nev.runs.checkpoint import load_model
from nev.runs.manifest import CheckpointError, read_manifest


class OpenedCheckpoint(NamedTuple):
    """A checkpoint that was opened.

    manifest: `state.json`.
    config: the experiment of the checkpoint, with overrides.
    text: the text tower before training, on the CPU.
    """

    location: str
    manifest: dict[str, Any]
    config: Experiment
    text: TextTower


def open_checkpoint(location: str, overrides: list[str]) -> OpenedCheckpoint:
    """Read the manifest of a checkpoint and load its text tower.

    overrides: `section.key=value`, over the checkpoint's own config.
    Raises CheckpointError for a location without a checkpoint, and where the text tower of this machine is not that of the run.
    """
    location = location.rstrip("/")
    if "://" not in location:
        location = str(Path(location).absolute())  # Ray's processes have other working folders
    manifest = read_manifest(location)
    # A checkpoint of somebody else must not switch on that code from the hub runs here.
    text_settings = {**manifest["config"].get("text", {}), "trust_remote_code": False}
    config = with_absolute_paths(
        parse(Experiment, {**manifest["config"], "text": text_settings}, overrides, where=location)
    )
    if config.lock != (lock := manifest["config"].get("lock", "text")):
        raise ConfigError(
            f"lock: {location} was trained with lock: {lock}, which decides whose weights it holds: leave lock out"
        )
    text = load_text(config.text)
    if text.fingerprint != manifest["fingerprints"]["text"]:
        raise CheckpointError(
            f"{location} was trained against another text tower than {config.text.encoder} on this machine"
        )
    return OpenedCheckpoint(location, manifest, config, text)


def load_logit_scale(location: str) -> float:
    """The logit scale of a checkpoint, 1 / temperature."""
    _, weights = load_model(location)
    return float(weights["log_scale"].exp())


def load_vision(location: str, config: Experiment, text_width: int) -> VisionTower:
    """The vision tower of a checkpoint, on the CPU, in training mode.

    config: the experiment of the checkpoint. text_width: width D of the text vectors.
    """
    settings = config.vision.model_copy(update={"pretrained": False, "weights": None})
    vision = build_vision(settings, config.data.image_size, text_width)
    _, weights = load_model(location)
    vision.load_state_dict(_below("vision.", weights))
    return vision


def load_text_tower(location: str, config: Experiment) -> TextTower:
    """The text tower of a checkpoint, on the CPU: as before training where it was locked, else as trained.

    config: the experiment of the checkpoint.
    """
    tower = load_text(config.text)
    if config.lock != "text":
        _, weights = load_model(location)
        tower.model.load_state_dict(_below("text.model.", weights))
    return tower


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
