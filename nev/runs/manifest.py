"""The checkpoints of a run, without their tensors: list, verify, choose, remove. No torch."""

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

FORMAT = 3
READ_BYTES = 2**25  # bytes of one read
PATIENCE_S = 300.0  # how long a read is retried

VALIDATION = "validation.json"  # metrics of a checkpoint that was validated beside training
Read = TypeVar("Read")


class CheckpointError(NevError, RuntimeError):
    """A checkpoint that is absent, damaged or unreadable, or belongs to another run. The message names it and the reason."""


class Damaged(CheckpointError):
    """A checkpoint whose bytes differ from those that were written."""


class Unreadable(CheckpointError):
    """A checkpoint that storage cannot read at the moment."""


@dataclass(frozen=True)
class CheckpointState:
    """The state of a run beside its tensors.

    step: number of updates done.
    config: the experiment, as JSON.
    fingerprints: hashes of the data, the plan, the text tower and a locked trunk, by the names data, plan, text, trunk,
    and of the weights that the run began from by `train.from`, start.
    metrics: of the validation at this step; empty without one.
    world_size: number of ranks W.
    bad_rows: rows that could not be used since the run's first step.
    history: the fields of `nev.train.worker.guards.GuardState`.
    """

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
        near = [checkpoint for run in runs if run for checkpoint in list_checkpoints(run)]
        hint = f"Found: {', '.join(near)}." if near else "Checkpoints lie in RUN/checkpoints/step-..."
        reason = "not a checkpoint (there is no state.json in it)" if fs.exists(path) else "there is no such folder"
        raise CheckpointError(f"{location}: {reason}. {hint}") from None
    except ValueError as error:
        raise Damaged(f"{location}/state.json: damaged ({error})") from error
    except storage_errors() as error:
        raise Unreadable(f"{location}/state.json: cannot be read ({error}). {remedy(error, '')}") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{location}: format {manifest.get('format')}, this version of nev reads format {FORMAT}")
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
    checkpoints = list_checkpoints(run)
    return checkpoints[-1] if checkpoints else None


class LatestValid(NamedTuple):
    """The newest valid checkpoint.

    damaged: the damage of each newer checkpoint.
    """

    location: str
    manifest: dict[str, Any]
    damaged: list[str]


def latest_valid(run: str, up_to: int | None = None) -> LatestValid | None:
    """Verify the checkpoints of a run, newest first, and return the first valid one; None for a run without a checkpoint.

    up_to: the latest step that counts; None for all.
    Raises CheckpointError if all are damaged, since the user must decide to start over, or if one cannot be read.
    """
    damaged: list[str] = []
    for step in reversed(list_steps(run)):
        if up_to is not None and step > up_to:
            continue
        location = checkpoint_location(run, step)
        try:
            return LatestValid(location, verify(location), damaged)
        except Damaged as error:
            damaged.append(str(error))
    if damaged:
        listed = "\n  ".join(damaged)
        raise CheckpointError(
            f"{run}: no checkpoint is whole:\n  {listed}\nPut a checkpoint back from a copy, or remove these to start over."
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
                computed = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError as error:
            raise Damaged(f"{location}/{name}: damaged (the file is missing)") from error
        except storage_errors() as error:
            raise Unreadable(f"{location}/{name}: cannot be read ({error}). {remedy(error, '')}") from error
        if computed != digest:
            raise Damaged(f"{location}/{name}: damaged (its sha256 is not the one in state.json)")
    return manifest


def with_retries(read: Callable[[], Read], seconds: float = PATIENCE_S) -> Read:
    """The result of `read`. Where storage fails, `read` is tried again for so many seconds; then the error is raised."""
    return Retrying(
        retry=retry_if_exception_type((StorageError, Unreadable)),
        wait=wait_exponential(max=20),
        stop=stop_after_delay(seconds),
        reraise=True,
    )(read)


def best_checkpoint(run: str, metric: str) -> str | None:
    """The checkpoint whose `metric` is highest, the newest among equals; None where no checkpoint has the metric."""
    scores = [(read_metrics(location).get(metric), location) for location in list_checkpoints(run)]
    known = [(value, location) for value, location in scores if value is not None]
    return max(known)[1] if known else None


def read_metrics(location: str) -> dict[str, float]:
    """The metrics of a checkpoint's validation, in or beside training; empty where it was not validated or is damaged."""
    try:
        metrics: dict[str, float] = read_manifest(location)["metrics"]
    except Damaged:
        return {}  # so it is never the best checkpoint
    return metrics or _validation(location) or {}


def _validation(location: str) -> dict[str, float] | None:
    """The metrics of a validation beside training; None where there was none."""
    fs, path = filesystem(join(location, VALIDATION))
    with storage_errors_as(join(location, VALIDATION), "read"):
        metrics: dict[str, float] | None = json.loads(fs.cat_file(path)) if fs.exists(path) else None
    return metrics


def pending_validation(run: str, validated: Callable[[int], bool]) -> list[str]:
    """The checkpoints that wait for their validation beside training (`nev.train.driver.validator`).

    validated: whether the checkpoint of a step is to be validated.
    """
    locations = [checkpoint_location(run, step) for step in list_steps(run) if validated(step)]
    return [location for location in locations if _unscored(location)]


def _unscored(location: str) -> bool:
    try:
        return not read_manifest(location)["metrics"] and _validation(location) is None
    except Damaged:
        return False  # a damaged checkpoint will not be validated


def remove_checkpoints_after(run: str, step: int) -> None:
    """Remove the checkpoints of later steps: they are damaged, since the run continues from `step`."""
    for newer in list_steps(run):
        if newer > step:
            remove_checkpoint(checkpoint_location(run, newer))


def prune_checkpoints(
    run: str,
    keep_last: int,
    keep_best: str | None,
    validated: Callable[[int], bool] = lambda step: False,
    keep_step: int | None = None,
) -> None:
    """Remove all checkpoints but the newest ones, the best one, that of `keep_step`, and those that wait for their validation.

    keep_last: number of newest checkpoints that stay.
    keep_best: metric of the best checkpoint; None to keep no best one.
    validated: whether the checkpoint of a step is to be validated beside training.
    """
    checkpoints = list_checkpoints(run)
    needed = {
        *checkpoints[-keep_last:],
        best_checkpoint(run, keep_best) if keep_best else None,
        None if keep_step is None else checkpoint_location(run, keep_step),
        *pending_validation(run, validated),
    }
    for location in checkpoints:
        if location not in needed:
            remove_checkpoint(location)


def remove_checkpoint(location: str) -> None:
    """Remove a checkpoint, or files of an incomplete one. state.json goes first, so that what is left is no checkpoint."""
    fs, path = filesystem(location)
    with storage_errors_as(location, "removed"):
        files = list_files(location)
        if "state.json" in files:
            fs.rm_file(f"{path}/state.json")
        if is_local(fs):
            fs.rm(path, recursive=True)
            return
        for name in files:  # one by one: s3fs reports no error where S3 refuses some of a bulk deletion
            fs.rm_file(f"{path}/{name}")
