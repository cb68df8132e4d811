"""Checkpoints that are complete or absent: safetensors and JSON, the manifest written last.

    <run>/checkpoints/step-00000500/  model.safetensors  optimizer.safetensors  rng.safetensors  state.json

`state.json` holds the sha256 of the other files and is written last, in one piece (locally by a rename, on S3 by one PUT); a
folder without it is not a checkpoint.
Nothing is pickled, so nothing is executed on load.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from nev.config.experiment import Experiment
from nev.models.text import TextTower, load_text
from nev.models.vision import VisionTower, build_vision
from nev.storage.files import files_below, filesystem, join, naming, remedy, storage_errors, write_whole
from nev.train.manifest import FORMAT, CheckpointError, Damaged, State, Unreadable, read_manifest, remove, verified
from nev.train.parallel import share_of, whole

PARTS = ("model", "optimizer", "rng")


class Tensors(NamedTuple):
    """By name: the model's parameters and buffers, and `<parameter>/<slot>` of the optimiser. On the CPU, contiguous."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def gather_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True, into: Tensors | None = None
) -> Tensors:
    """A copy of what a checkpoint holds of a model and its optimiser, empty unless `keep`.

    into: what an earlier call gave; its memory is filled again (pages of new memory cost more than the copy).
    Of what FSDP has split (`nev.train.parallel`) each rank gives its part, one tensor after another: every rank must come here.
    """
    copied = into or Tensors({}, {})
    for source, target in zip((model.state_dict(), optimizer_tensors(model, optimizer)), copied, strict=True):
        for name, tensor in source.items():
            full = whole(tensor).detach()
            if keep:
                if name not in target:
                    target[name] = torch.empty(full.shape, dtype=full.dtype, pin_memory=full.is_cuda)
                target[name].copy_(full, non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copied


def save(
    run: str, state: State, tensors: Tensors, rng: dict[str, Tensor], beside: dict[str, bytes] | None = None
) -> str:
    """Write a checkpoint under `run` (path or URL) and return its location. Raises StorageError.

    `rng` holds uint8 [n] states by name, `beside` further files by name: complete and checksummed with the rest.
    """
    location = join(run, "checkpoints", f"step-{state.step:08d}")
    with naming(location, "listed"):
        left = files_below(location)
    if left:
        remove(location)  # by a run that died here, or by one that reached this step before
    digests = {}
    for name, data in _files(tensors, rng, beside or {}):
        digests[name] = hashlib.sha256(data).hexdigest()
        _write(location, name, data)
    manifest = {"format": FORMAT, **state.__dict__, "sha256": digests, "versions": {"torch": torch.__version__}}
    _write(location, "state.json", json.dumps(manifest, indent=1).encode())
    return location


def _files(tensors: Tensors, rng: dict[str, Tensor], beside: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """One file after another: a copy of all at once would take the memory of the model and its moments again."""
    yield "model.safetensors", safetensors.torch.save(tensors.model)
    yield "optimizer.safetensors", safetensors.torch.save(tensors.optimizer)
    yield "rng.safetensors", safetensors.torch.save(rng)
    yield from beside.items()


def _write(location: str, name: str, data: bytes) -> None:
    with naming(join(location, name), "written"):
        write_whole(join(location, name), data)


def load(location: str) -> tuple[State, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(state, model, optimiser and rng tensors) of a checkpoint, checksums verified. Raises CheckpointError."""
    manifest = verified(location, besides=[f"{name}.safetensors" for name in PARTS])  # whose checksums are taken below
    model, optimizer, rng = (_tensors(location, manifest, name) for name in PARTS)
    return _state(manifest), model, optimizer, rng


def load_model(location: str) -> tuple[State, dict[str, Tensor]]:
    """The state and the model's tensors alone."""
    manifest = read_manifest(location)
    return _state(manifest), _tensors(location, manifest, "model")


def _state(manifest: dict[str, Any]) -> State:
    return State(**{key: manifest[key] for key in State.__dataclass_fields__})


def _tensors(location: str, manifest: dict[str, Any], name: str) -> dict[str, Tensor]:
    file = f"{name}.safetensors"
    fs, path = filesystem(join(location, file))
    try:
        data = fs.cat_file(path)
        if hashlib.sha256(data).hexdigest() != manifest["sha256"].get(file):
            raise Damaged(f"{location}/{file}: damaged (its sha256 is not the one in state.json)")
        return safetensors.torch.load(data)
    except FileNotFoundError as error:
        raise Damaged(f"{location}/{file}: damaged (it is not there)") from error
    except safetensors.SafetensorError as error:
        raise Damaged(f"{location}/{file}: damaged ({error})") from error
    except storage_errors() as error:
        raise Unreadable(f"{location}/{file}: cannot be read ({error}). {remedy(error, '')}") from error


def logit_scale(location: str) -> float:
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


def load_tower(location: str, config: Experiment) -> TextTower:
    """The text tower of a checkpoint of `config`, on the CPU: as the run found it, or as it trained it."""
    tower = load_text(config.text)
    if config.lock != "text":
        _, weights = load_model(location)
        tower.model.load_state_dict(_below("text.model.", weights))
    return tower


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter name: `<parameter>/<slot>`, as exp_avg, exp_avg_sq and step."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{slot}": value
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
    }


def refuse_unknown(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError where the parameters of `optimizer_tensors` are not those of the model."""
    if unknown := {key.rpartition("/")[0] for key in tensors} - {name for name, _ in model.named_parameters()}:
        raise CheckpointError(f"optimiser state of parameters that the model lacks: {sorted(unknown)[:5]}")


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put `optimizer_tensors` back, whole as they are, into an optimiser whose parameters FSDP may have split."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, _, slot = key.rpartition("/")
        parameter = parameters[name]
        # AdamW keeps `step` as one number in float32; fused AdamW wants all on the parameter's device.
        optimizer.state[parameter][slot] = share_of(value, parameter) if value.ndim else value.to(parameter.device)
