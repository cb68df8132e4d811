"""The towers of a checkpoint, with the config of its run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.file import parse
from nev.config.paths import with_absolute_paths
from nev.models.frozen import FeatureHead, FrozenTower, FrozenTrunk, build_feature_head, load_frozen_trunk
from nev.models.text import TextTower, load_text
from nev.models.tower_weights import cut_prefix
from nev.models.vision import VisionTower, build_vision
from nev.runs.checkpoint import TRUNK_FILE, load_model, load_tensors
from nev.runs.manifest import CheckpointError, read_manifest

TEXT = "text.model."  # the names of a trained text model's tensors begin so


def read_experiment(location: str, manifest: dict[str, Any], overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a checkpoint, with overrides.

    manifest: `state.json` of the checkpoint.
    overrides: `section.key=value`, over the checkpoint's own config.
    Raises ConfigError for overrides that do not fit.
    """
    # A checkpoint of somebody else must not switch on that code from the hub runs here.
    text = {**manifest["config"].get("text", {}), "trust_remote_code": False}
    raw = {**manifest["config"], "text": text}
    config = with_absolute_paths(parse(Experiment, raw, list(overrides), where=location))
    if config.lock != (lock := manifest["config"].get("lock", "text")):
        raise ConfigError(
            f"lock: {location} was trained with lock: {lock}, which decides whose weights it holds: leave lock out"
        )
    return config


def load_base_text(location: str, manifest: dict[str, Any], config: Experiment) -> TextTower:
    """The text tower before training, on the CPU. Raises CheckpointError where this machine's text tower is not the run's.

    manifest: `state.json` of the checkpoint. config: the experiment of the checkpoint.
    """
    text = load_text(config.text)
    if text.fingerprint != manifest["fingerprints"]["text"]:
        raise CheckpointError(
            f"{location} was trained against another text tower than {config.text.encoder} on this machine"
        )
    return text


def load_logit_scale(location: str) -> float:
    """The logit scale of a checkpoint, 1 / temperature."""
    _, weights = load_model(location)
    return float(weights["log_scale"].exp())


def load_vision(
    location: str, config: Experiment, text_width: int, weights: dict[str, Tensor] | None = None
) -> VisionTower | FrozenTower:
    """The vision tower of a checkpoint, on the CPU, in training mode: float [b, 3, S, S] to unit vectors, float32 [b, D].

    config: the experiment of the checkpoint. text_width: width D of the text vectors.
    weights: the model's tensors in the checkpoint. None: they are read.
    Raises CheckpointError for weights that do not fit, and for a locked trunk that the checkpoint does not hold, and that is not
    to be had here.
    """
    if config.vision.lock:
        trunk = load_trunk(location, config)
        return FrozenTower(trunk, load_feature_head(location, config, text_width, trunk.shape, weights))
    settings = config.vision.model_copy(update={"pretrained": False, "weights": None})
    vision = build_vision(settings, config.data.image_size, text_width)
    _fill(vision, "vision.", location, config, weights)
    return vision


def load_trunk(location: str, config: Experiment) -> FrozenTrunk:
    """The locked trunk of a checkpoint, on the CPU: from the checkpoint where that holds it, else as its config says.

    Raises CheckpointError where it is not to be had here, or is another one.
    """
    manifest = read_manifest(location)
    state, wanted = None, manifest["fingerprints"]["trunk"]
    if TRUNK_FILE in manifest["sha256"]:
        state = load_tensors(location, manifest, TRUNK_FILE)
    instead = " --set vision.pretrained=false" if config.vision.pretrained else ""
    hint = f"Name it with{instead} --set vision.weights=FILE, or train with --with-trunk, which saves it with every checkpoint."
    try:
        trunk = load_frozen_trunk(config.vision, config.data.image_size, state)
    except ConfigError as error:
        raise CheckpointError(f"{location} needs the locked trunk that it was trained on: {error}. {hint}") from error
    if trunk.fingerprint != wanted:
        raise CheckpointError(
            f"{location} was trained on another trunk (fingerprint {wanted[:12]}) than {config.vision.trunk} on this machine "
            f"({trunk.fingerprint[:12]}). {hint}"
        )
    return trunk


def load_feature_head(
    location: str,
    config: Experiment,
    text_width: int,
    shape: tuple[int, ...],
    weights: dict[str, Tensor] | None = None,
) -> FeatureHead:
    """The layers behind the locked trunk of a checkpoint, on the CPU.

    shape: of one picture's features. weights: as `load_vision`.
    """
    head = build_feature_head(config.vision, config.data.image_size, shape, text_width)
    _fill(head, "vision.", location, config, weights)
    return head


def load_text_tower(location: str, config: Experiment) -> TextTower:
    """The text tower of a checkpoint, on the CPU: as before training where it was locked, else as trained.

    config: the experiment of the checkpoint.
    """
    tower = load_text(config.text)
    if config.lock != "text":
        _fill(tower.model, TEXT, location, config, None)
    return tower


def load_same_text_tower(
    location: str, manifest: dict[str, Any], config: Experiment, weights: dict[str, Tensor]
) -> TextTower:
    """As `load_text_tower`, but the encoder is compared with the run's first. Raises CheckpointError where it is another one.

    manifest: `state.json` of the checkpoint. config: the experiment of the checkpoint. weights: the text model's trained tensors.
    """
    tower = load_base_text(location, manifest, config)
    if config.lock != "text":
        _fill(tower.model, TEXT, location, config, weights)
    return tower


def _fill(module: nn.Module, prefix: str, location: str, config: Experiment, weights: dict[str, Tensor] | None) -> None:
    """Load the tensors below `prefix` into a module. Raises CheckpointError where they do not fit."""
    weights = load_model(location)[1] if weights is None else weights
    try:
        module.load_state_dict(cut_prefix(prefix, weights))
    except RuntimeError as error:
        raise CheckpointError(
            f"{location} does not fit its config with the text encoder {config.text.encoder}. Is that the encoder that it was "
            f"trained against? {error}"
        ) from error
