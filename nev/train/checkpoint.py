"""Checkpoints that are complete or absent: safetensors and JSON, the manifest written last.

    <run>/checkpoints/step-00000500/  model.safetensors  optimizer.safetensors  rng.safetensors  state.json

`state.json` holds the sha256 of the other files and is written last, in one piece; a folder without it is not a checkpoint.
Nothing is pickled, so nothing is executed on load.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from nev.data.storage import filesystem, join
from nev.errors import NevError

FORMAT = 1


class CheckpointError(NevError, RuntimeError):
    """A checkpoint that is damaged, or belongs to another run. The message says which and what differs."""


@dataclass(frozen=True)
class State:
    """What a run needs beside its tensors. `step` is the number of updates done; `metrics` are the latest evaluation's."""

    step: int
    config: dict[str, Any]
    fingerprints: dict[str, str]
    mlflow_run_id: str | None
    metrics: dict[str, float]
    world_size: int
    bad_rows: int


def save(run: str, state: State, model: nn.Module, optimizer: torch.optim.Optimizer, rng: dict[str, Tensor]) -> str:
    """Write a checkpoint under `run` (path or URL) and return its location. `rng` holds uint8 [n] states by name."""
    location = join(run, "checkpoints", f"step-{state.step:08d}")
    fs, path = filesystem(location)
    if fs.exists(path):
        remove(location)  # left by a run that died here, or by one that reached this step before
    fs.makedirs(path, exist_ok=True)
    parts = {
        "model.safetensors": safetensors.torch.save(_cpu(model.state_dict())),
        "optimizer.safetensors": safetensors.torch.save(_cpu(optimizer_tensors(model, optimizer))),
        "rng.safetensors": safetensors.torch.save(rng),
    }
    for name, data in parts.items():
        fs.pipe_file(f"{path}/{name}", data)
    manifest = {
        "format": FORMAT,
        **state.__dict__,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()},
        "versions": {"torch": torch.__version__},
    }
    partial = f"{path}/state.json.partial"
    fs.pipe_file(partial, json.dumps(manifest, indent=1).encode())
    fs.mv(partial, f"{path}/state.json")
    return location


def load(location: str) -> tuple[State, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(state, model, optimiser and rng tensors) of a checkpoint, checksums verified. Raises CheckpointError."""
    fs, path = filesystem(location)
    manifest = read_manifest(location)
    tensors = []
    for name, expected in manifest["sha256"].items():
        try:
            data = fs.cat_file(f"{path}/{name}")
            if hashlib.sha256(data).hexdigest() != expected:
                raise CheckpointError(f"{location}/{name}: damaged (its sha256 is not the one in state.json)")
            tensors.append(safetensors.torch.load(data))
        except (FileNotFoundError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{location}/{name}: {error}") from error
    keys = State.__dataclass_fields__
    return State(**{key: manifest[key] for key in keys}), *tensors  # type: ignore[return-value]


def load_model(location: str) -> tuple[State, dict[str, Tensor]]:
    """The state and the model's tensors alone."""
    state, model, _, _ = load(location)
    return state, model


def read_manifest(location: str) -> dict[str, Any]:
    """`state.json` of a checkpoint. Raises CheckpointError where it is absent, unreadable or of another format."""
    fs, path = filesystem(location)
    try:
        manifest: dict[str, Any] = json.loads(fs.cat_file(f"{path}/state.json"))
    except FileNotFoundError:
        raise CheckpointError(f"{location}: not a checkpoint (there is no state.json in it)") from None
    except ValueError as error:
        raise CheckpointError(f"{location}/state.json: damaged ({error})") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{location}: format {manifest.get('format')}, this version reads {FORMAT}")
    return manifest


def checkpoints(run: str) -> list[str]:
    """Locations of the complete checkpoints of a run, oldest first."""
    folder = join(run, "checkpoints")
    fs, path = filesystem(folder)
    if not fs.exists(path):
        return []
    names = sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False, refresh=True))
    return [join(folder, name) for name in names if name.startswith("step-") and fs.exists(f"{path}/{name}/state.json")]


def latest(run: str) -> str | None:
    """The newest complete checkpoint of a run, or None."""
    found = checkpoints(run)
    return found[-1] if found else None


def best(run: str, metric: str) -> str | None:
    """The checkpoint whose `metric` is highest (the newest among equals), or None where none has it."""
    scored = [(read_manifest(location)["metrics"].get(metric), location) for location in checkpoints(run)]
    held = [(value, location) for value, location in scored if value is not None]
    return max(held)[1] if held else None


def prune(run: str, keep_last: int, keep_best: str | None) -> None:
    """Remove all but the `keep_last` newest checkpoints and the best one by the metric `keep_best`."""
    found = checkpoints(run)
    kept = {*found[-keep_last:], best(run, keep_best) if keep_best else None}
    for location in found:
        if location not in kept:
            remove(location)


def remove(location: str) -> None:
    """Delete a checkpoint, its manifest first, so that it is never seen in part."""
    fs, path = filesystem(location)
    if fs.exists(f"{path}/state.json"):
        fs.rm_file(f"{path}/state.json")
    fs.rm(path, recursive=True)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter name: `<parameter>/<slot>`, as exp_avg, exp_avg_sq and step."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{slot}": value
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put `optimizer_tensors` back. Raises CheckpointError where the parameters are not those of the model."""
    parameters = dict(model.named_parameters())
    if unknown := {key.rpartition("/")[0] for key in tensors} - set(parameters):
        raise CheckpointError(f"optimiser state of parameters that the model lacks: {sorted(unknown)[:5]}")
    for key, value in tensors.items():
        name, _, slot = key.rpartition("/")
        parameter = parameters[name]
        # AdamW keeps `step` in float32 and the moments in the parameter's dtype; fused AdamW wants all on its device.
        optimizer.state[parameter][slot] = value.to(parameter.device)


def _cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
