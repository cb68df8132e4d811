"""The towers of a run: its checkpoint opened with the config that it was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.file import parse
from nev.config.paths import with_absolute_paths
from nev.models.text import TextTower, load_text
from nev.models.vision import VisionTower, build_vision
from nev.runs.checkpoint import load_model
from nev.runs.manifest import CheckpointError, read_manifest

if TYPE_CHECKING:
    from nev.models.text import TextTower


class OpenedCheckpoint(NamedTuple):
    """A checkpoint, and what it was trained with: the config (with overrides) and the text tower as the run found it."""

    location: str
    manifest: dict[str, Any]
    config: Experiment
    text: TextTower


def open_checkpoint(location: str, overrides: list[str]) -> OpenedCheckpoint:
    """Read a checkpoint's manifest and load its text tower.

    Raises CheckpointError where it is none, or where the text tower here is not the one that it was trained against.
    """
    from nev.models.text import load_text

    location = location.rstrip("/")
    if "://" not in location:
        location = str(Path(location).absolute())  # Ray's processes have other working folders
    manifest = read_manifest(location)
    # Whoever made the checkpoint may say what is evaluated, but not that code from the hub runs here.
    own_text = {**manifest["config"].get("text", {}), "trust_remote_code": False}
    config = with_absolute_paths(parse(Experiment, {**manifest["config"], "text": own_text}, overrides, where=location))
    if config.lock != (own := manifest["config"].get("lock", "text")):
        raise ConfigError(f"lock: {location} was trained with lock: {own}, which says whose weights it holds: leave it")
    text = load_text(config.text)
    if text.fingerprint != manifest["fingerprints"]["text"]:
        raise CheckpointError(f"{location} was trained against another text tower than {config.text.encoder} is here")
    return OpenedCheckpoint(location, manifest, config, text)


def load_logit_scale(location: str) -> float:
    """1 / temperature, as a checkpoint has learned it."""
    _, weights = load_model(location)
    return float(weights["log_scale"].exp())


def load_vision(location: str, config: Experiment, text_width: int) -> VisionTower:
    """The vision tower of a checkpoint of `config`, on the CPU, in training mode as it was built."""
    own = config.vision.model_copy(update={"pretrained": False, "weights": None})
    vision = build_vision(own, config.data.image_size, text_width)
    _, weights = load_model(location)
    vision.load_state_dict(_below("vision.", weights))
    return vision


def load_text_tower(location: str, config: Experiment) -> TextTower:
    """The text tower of a checkpoint of `config`, on the CPU: as the run found it, or as it trained it."""
    tower = load_text(config.text)
    if config.lock != "text":
        _, weights = load_model(location)
        tower.model.load_state_dict(_below("text.model.", weights))
    return tower


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
