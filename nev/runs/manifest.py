"""The checkpoints of a run, seen from outside: which there are, what their manifests say, which to keep. No torch in it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from nev.common.errors import NevError
from nev.storage.files import (
    StorageError,
    filesystem,
    is_local,
    join,
    list_files,
    remedy,
    storage_errors,
    storage_errors_as,
)

FORMAT = 2
READ_BYTES = 2**25  # a request
PATIENCE_S = 300.0

VALIDATION = "validation.json"
Read = TypeVar("Read")


class CheckpointError(NevError, RuntimeError):
    """A checkpoint that is damaged, or belongs to another run. The message says which and what differs."""


class Damaged(CheckpointError):
    """A checkpoint whose bytes are not those that were written."""


class Unreadable(CheckpointError):
    """A checkpoint that storage does not give now."""


@dataclass(frozen=True)
class CheckpointState:
    """What a run needs beside its tensors. `step` is the number of updates done; `metrics` are the latest evaluation's."""

    step: int
    config: dict[str, Any]
    fingerprints: dict[str, str]
    metrics: dict[str, float]
    world_size: int
    bad_rows: int
    history: dict[str, Any]


def read_manifest(location: str) -> dict[str, Any]:
    """`state.json` of a checkpoint. Raises CheckpointError where it is absent, unreadable or of another format."""
    fs, path = filesystem(location)
    try:
        manifest: dict[str, Any] = json.loads(fs.cat_file(f"{path}/state.json"))
    except FileNotFoundError:
        runs = (location, location.rstrip("/").rpartition("/checkpoints")[0])
        near = [found for run in runs if run for found in list_checkpoints(run)]
        there = (
            f"There {'is' if len(near) == 1 else 'are'} {', '.join(near)}."
            if near
            else "Checkpoints lie in RUN/checkpoints/step-..."
        )
        raise CheckpointError(f"{location}: not a checkpoint (there is no state.json in it). {there}") from None
    except ValueError as error:
        raise Damaged(f"{location}/state.json: damaged ({error})") from error
    except storage_errors() as error:
        raise Unreadable(f"{location}/state.json: cannot be read ({error}). {remedy(error, '')}") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{location}: format {manifest.get('format')}, this version reads {FORMAT}")
    return manifest


def checkpoint_location(run: str, step: int) -> str:
    """Where the checkpoint of a step lies."""
    return join(run, "checkpoints", f"step-{step:08d}")


def checkpoint_step(location: str) -> int | None:
    """The step of a checkpoint, from its folder's name; None for a folder that nev did not name, as `step-00000500.bak`."""
    name = location.rstrip("/").rpartition("/")[2]
    digits = name.removeprefix("step-")
    return int(digits) if re.fullmatch("[0-9]+", digits) and name == f"step-{int(digits):08d}" else None


def list_steps(run: str) -> list[int]:
    """The steps of the complete checkpoints of a run, in order. Raises StorageError where they cannot be listed."""
    folder = join(run, "checkpoints")
    with storage_errors_as(folder, "listed"):
        files = [file.split("/") for file in list_files(folder)]
    steps = [checkpoint_step(parts[0]) for parts in files if parts[1:] == ["state.json"]]
    return sorted(step for step in steps if step is not None)


def list_checkpoints(run: str) -> list[str]:
    """Locations of the complete checkpoints of a run, oldest first. Raises StorageError where they cannot be listed."""
    return [checkpoint_location(run, step) for step in list_steps(run)]


def latest_checkpoint(run: str) -> str | None:
    """The newest complete checkpoint of a run, or None."""
    found = list_checkpoints(run)
    return found[-1] if found else None


class LatestValid(NamedTuple):
    """The newest valid checkpoint.

    damaged: the damage of each newer checkpoint.
    """

    location: str
    manifest: dict[str, Any]
    damaged: list[str]


def latest_valid(run: str) -> LatestValid | None:
    """Verify the checkpoints of a run, newest first, and return the first valid one; None for a run without a checkpoint.

    Raises CheckpointError where all are damaged, since only a person may decide to start over, and where one cannot be read.
    """
    damaged: list[str] = []
    for location in reversed(list_checkpoints(run)):
        try:
            return LatestValid(location, verify(location), damaged)
        except Damaged as error:
            damaged.append(str(error))
    if damaged:
        listed = "\n  ".join(damaged)
        raise CheckpointError(
            f"{run}: no checkpoint is whole:\n  {listed}\nPut one back from a copy, or remove them to start over."
        )
    return None


def verify(location: str) -> dict[str, Any]:
    """Read every file of a checkpoint and return its manifest. Raises Damaged where a file is not as it was written.

    A checkpoint in the folder of another step is damaged, too.
    """
    manifest = read_manifest(location)
    if checkpoint_step(location) not in (None, manifest["step"]):
        raise Damaged(f"{location}/state.json: damaged (it is the checkpoint of step {manifest['step']})")
    for name, digest in manifest["sha256"].items():
        if "/" in name:
            raise Damaged(f"{location}/state.json: damaged (it names {name!r}, which is no file of a checkpoint)")
        fs, path = filesystem(join(location, name))
        try:
            with fs.open(path, "rb", block_size=READ_BYTES) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError as error:
            raise Damaged(f"{location}/{name}: damaged (it is not there)") from error
        except storage_errors() as error:
            raise Unreadable(f"{location}/{name}: cannot be read ({error}). {remedy(error, '')}") from error
        if found != digest:
            raise Damaged(f"{location}/{name}: damaged (its sha256 is not the one in state.json)")
    return manifest


def with_retries(read: Callable[[], Read]) -> Read:
    """What `read` gives; storage that fails is asked again for five minutes, since a run that starts again has nothing else."""
    return Retrying(
        retry=retry_if_exception_type((StorageError, Unreadable)),
        wait=wait_exponential(max=20),
        stop=stop_after_delay(PATIENCE_S),
        reraise=True,
    )(read)


def best_checkpoint(run: str, metric: str) -> str | None:
    """The checkpoint whose `metric` is highest (the newest among equals), or None where none has it."""
    scored = [(read_metrics(location).get(metric), location) for location in list_checkpoints(run)]
    held = [(value, location) for value, location in scored if value is not None]
    return max(held)[1] if held else None


def read_metrics(location: str) -> dict[str, float]:
    """What a checkpoint scored, in training or afterwards; nothing where it was not validated, or is damaged."""
    try:
        metrics: dict[str, float] = read_manifest(location)["metrics"]
    except Damaged:
        return {}  # not one to choose
    return metrics or _validation(location) or {}


def _validation(location: str) -> dict[str, float] | None:
    """What a validation of this checkpoint gave that was made after it; None where there was none."""
    fs, path = filesystem(join(location, VALIDATION))
    with storage_errors_as(join(location, VALIDATION), "read"):
        metrics: dict[str, float] | None = json.loads(fs.cat_file(path)) if fs.exists(path) else None
    return metrics


def pending_validation(run: str, validated: Callable[[int], bool]) -> list[str]:
    """The checkpoints that are to be validated after they were written (see `nev.train.driver.validator`), and are not yet.

    validated: whether those of a step are.
    """
    locations = [checkpoint_location(run, step) for step in list_steps(run) if validated(step)]
    return [location for location in locations if _unscored(location)]


def _unscored(location: str) -> bool:
    try:
        return not read_manifest(location)["metrics"] and _validation(location) is None
    except Damaged:
        return False  # nor will it be


def remove_checkpoints_after(run: str, step: int) -> None:
    """Remove the checkpoints beyond `step`, which a run goes on from since they are damaged."""
    for newer in list_steps(run):
        if newer > step:
            remove_checkpoint(checkpoint_location(run, newer))


def prune_checkpoints(
    run: str, keep_last: int, keep_best: str | None, awaited: Callable[[int], bool] = lambda step: False
) -> None:
    """Remove all checkpoints but the `keep_last` newest, the best one by `keep_best`, and those of `pending_validation`."""
    found = list_checkpoints(run)
    kept = {
        *found[-keep_last:],
        best_checkpoint(run, keep_best) if keep_best else None,
        *pending_validation(run, awaited),
    }
    for location in found:
        if location not in kept:
            remove_checkpoint(location)


def remove_checkpoint(location: str) -> None:
    """Delete a checkpoint or what is left of one, its manifest first, so that it is never seen in part."""
    fs, path = filesystem(location)
    with storage_errors_as(location, "removed"):
        files = list_files(location)
        if "state.json" in files:
            fs.rm_file(f"{path}/state.json")
        if is_local(fs):
            fs.rm(path, recursive=True)
            return
        for name in files:  # one by one: what S3 refuses of a deletion of many, s3fs does not tell
            fs.rm_file(f"{path}/{name}")
