"""`train.from`: a new run begins from the model of a checkpoint, without its optimiser, its position in the data or its rates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from nev.common.errors import first_few
from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.inference.checkpoints import choose_checkpoint
from nev.models.frozen import build_feature_head
from nev.models.vision import build_vision
from nev.runs.checkpoint import load_model
from nev.runs.manifest import read_manifest
from nev.runs.towers import TEXT

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nev.data.image_sidecar import TrunkFacts
    from nev.models.text import TextTower

BIAS = "bias"  # of a sigmoid loss: the loss of the new run may be another
Shapes = dict[str, tuple[int, ...]]


class StartCheckpoint(NamedTuple):
    """The checkpoint that a new run begins from.

    location: of the checkpoint. digest: sha256 of its weights.
    """

    location: str
    digest: str


def find_start(config: Experiment, text: TextTower, trunk: TrunkFacts | None) -> StartCheckpoint:
    """Find and read the checkpoint that `train.from` names, and check that its model is the model of `config`.

    text: the text tower before training. trunk: a locked trunk; None where the trunk is trained.
    Raises CheckpointError for a location without a checkpoint, or a damaged one, ConfigError for another model.
    """
    import torch

    assert config.train.from_
    location = choose_checkpoint(config.train.from_)
    manifest = read_manifest(location)
    refuse_other_space(location, manifest, config, text, trunk)
    tensors = load_model(location)[1]
    with torch.device("meta"):
        vision: nn.Module
        if trunk:
            vision = build_feature_head(config.vision, config.data.image_size, trunk.shape, text.width)
        else:
            settings = config.vision.model_copy(update={"pretrained": False, "weights": None})
            vision = build_vision(settings, config.data.image_size, text.width)
    here = {f"vision.{name}": tuple(tensor.shape) for name, tensor in vision.state_dict().items()}
    there = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith("vision.")}
    refuse_other_shapes(location, there, here)
    return StartCheckpoint(location, manifest["sha256"]["model.safetensors"])


def refuse_other_space(
    location: str, manifest: dict[str, Any], config: Experiment, text: TextTower, trunk: TrunkFacts | None
) -> None:
    """Raise ConfigError where a checkpoint's vectors, or its features, are not those of `config`. manifest: its `state.json`."""
    lock = manifest["config"].get("lock", "text")
    if manifest["fingerprints"]["text"] != text.fingerprint:
        raise ConfigError(
            f"train.from: {location} was trained towards another text encoder than {config.text.encoder}. Its vision tower alone "
            f"is taken by vision.weights={location}"
        )
    if lock != "text" and config.lock == "text":
        raise ConfigError(
            f"train.from: {location} was trained with lock: {lock}, so its pictures belong to its own text tower, and "
            f"lock: text would train towards the encoder as it was: give lock={lock}"
        )
    there, here = manifest["fingerprints"].get("trunk"), trunk.fingerprint if trunk else None
    if there != here:
        raise ConfigError(
            f"train.from: {location} was trained {_describe_trunk(there)}, and this run trains {_describe_trunk(here)}: set the "
            "section vision as it was there"
        )


def _describe_trunk(fingerprint: str | None) -> str:
    return f"behind the locked trunk {fingerprint[:12]}" if fingerprint else "with its trunk"


def refuse_other_shapes(location: str, there: Shapes, here: Shapes) -> None:
    """Raise ConfigError, with names, where the tensors of two vision towers have other names or shapes."""
    wrong = {
        "missing there": [name for name in here if name not in there],
        "not in this model": [name for name in there if name not in here],
        "of another shape": [
            f"{name} {there[name]} for {here[name]}" for name in here if name in there and there[name] != here[name]
        ],
    }
    if lines := [f"\n  {kind}: {first_few(names)}" for kind, names in wrong.items() if names]:
        raise ConfigError(
            f"train.from: {location} has another vision tower than this experiment: set vision and data.image_size as they were "
            f"there{''.join(lines)}"
        )


def load_start(model: nn.Module, location: str) -> None:
    """Load the model of a checkpoint into `model`, which `find_start` has compared with it.

    A text tower that was locked there is not in the checkpoint and stays as it is. So does the bias of a sigmoid loss.
    Raises CheckpointError where the checkpoint is gone or damaged, ConfigError where it does not fit after all.
    """
    tensors: dict[str, Tensor] = load_model(location)[1]
    names = set(model.state_dict())
    missing = [name for name in names - tensors.keys() if not name.startswith(TEXT.split(".")[0]) and name != BIAS]
    unknown = [name for name in tensors.keys() - names if name != BIAS]
    if missing or unknown:
        raise ConfigError(f"train.from: {location} does not fit: {first_few(sorted([*missing, *unknown]))}")
    try:
        model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise ConfigError(f"train.from: {location} does not fit: {error}") from error
