"""The folder of a run: a path that its processes see, or a prefix of an S3 bucket; with the checks before a run."""

from __future__ import annotations

import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.runs.tracking import tracking_uri
from nev.storage.files import (
    filesystem,
    is_local,
    join,
    list_entries,
    list_files,
    remedy,
    storage_errors,
    write_atomic,
)


def run_folder(config: Experiment) -> str:
    """`<output>/<name>`."""
    return join(config.output, config.name)


def check_output(config: Experiment) -> None:
    """Raise ConfigError where a small file cannot be written, listed and deleted in the run's folder.

    Also raises ConfigError for an output on S3 without `tracking.uri`, since MLflow's default file cannot lie there.
    """
    tracking_uri(config.tracking, config.output)
    check_writable(run_folder(config), f"output = {config.output!r}")


def check_writable(folder: str, setting: str) -> None:
    """Raise ConfigError where a small file cannot be written, listed and deleted in a folder.

    folder: path or URL. setting: what the user has given, for messages.
    """
    probe = join(folder, f".probe-{uuid.uuid4().hex}")
    fs, path = filesystem(probe)
    is_new = is_local(fs) and not Path(path).parent.exists()
    try:
        write_atomic(join(probe, "file"), b"nev")
        names = list_files(probe)
        fs.rm_file(f"{path}/file")
        if is_local(fs):
            fs.rmdir(path)
        if is_new:  # a run that is refused leaves no folder
            with suppress(OSError):  # another driver writes there already
                Path(path).parent.rmdir()
    except storage_errors() as error:
        raise ConfigError(f"{setting} cannot be used: {error}. {output_remedy(error, path)}") from error
    if names != ["file"]:
        raise ConfigError(
            f"{setting} cannot be used: a file that was written there is not listed at once. Give another output."
        )


def check_space(run: str, checkpoints: int, size: int, artifacts: Path | None = None, copy: int = 0) -> None:
    """Raise ConfigError where the disk of a run's folder has no room for its checkpoints.

    checkpoints: how many are kept; one more is being written.
    size: bytes of a checkpoint.
    artifacts: the local folder of the run's MLflow artifacts, which get a copy of the weights; None for artifacts elsewhere.
    copy: bytes of that copy, counted where `artifacts` lies on the same disk.
    Checkpoints and a copy that exist already count as room.
    """
    fs, path = filesystem(run)
    if not is_local(fs):
        return
    there = _nearest(Path(path))
    needed = (checkpoints + 1) * size - sum(info["size"] for info in list_entries(fs, f"{path}/checkpoints").values())
    parts = f"{checkpoints + 1} of {size / 2**30:.2f} GiB"
    if artifacts and _nearest(artifacts).stat().st_dev == there.stat().st_dev:
        needed += copy - sum(info["size"] for info in list_entries(fs, str(artifacts / "checkpoint")).values())
        parts += f", and MLflow's copy of the weights, {copy / 2**30:.2f} GiB"
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ConfigError(
            f"output: {there} has {free / 2**30:.1f} GiB free, and the checkpoints of this run take {needed / 2**30:.1f} GiB "
            f"({parts}). Make room, lower train.keep_last, or give another output."
        )


def _nearest(folder: Path) -> Path:
    """A folder, or the nearest one above it that exists."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def output_remedy(error: Exception, path: str) -> str:
    """The remedy for an output that failed its probe at `path`."""
    if path.startswith("/"):
        return "Give a folder that can be written to with --set output=..."
    bucket = path.split("/")[0]
    if isinstance(error, FileNotFoundError):
        return f"Make the bucket (aws s3 mb s3://{bucket}), or give another one with --set output=s3://BUCKET/PREFIX."
    if isinstance(error, PermissionError):
        return (
            f"A run needs s3:PutObject, GetObject and DeleteObject on s3://{bucket}/*, and s3:ListBucket on the bucket: "
            "allow them, or check AWS_PROFILE or AWS_ACCESS_KEY_ID."
        )
    return remedy(error, "")
