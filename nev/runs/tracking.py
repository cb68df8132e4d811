"""MLflow: an SQLite file beside the runs by default, a server by URI. A training run is one MLflow run over all its starts."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel
from tenacity import RetryError, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from nev.common.errors import first_line
from nev.config.base import ConfigError
from nev.config.experiment import Tracking
from nev.config.file import flatten
from nev.storage.files import filesystem, join, list_files, local_copy, upload

RESUME_FILES = (
    "optimizer.safetensors",
    "rng.safetensors",
)  # of a checkpoint, twice the weights: only a resumed run needs them
MAX_METRICS_A_CALL = 1000  # MLflow's limit for log_batch
PATIENCE_S = 60.0  # for how long the end of a run waits for a server that does not answer


def tracking_uri(config: Tracking, output: str) -> str:
    """The URI of the config, or of an SQLite file in the output folder. Raises ConfigError for the latter on S3."""
    if config.uri:
        return config.uri
    if "://" in output:
        raise ConfigError(
            f"output = {output!r} needs tracking.uri: MLflow's default, an SQLite file in the output folder, can't lie "
            "there. Give a server (http://HOST:5000), or sqlite:////FOLDER/mlflow.db for a file on this machine."
        )
    return f"sqlite:///{Path(output).expanduser().absolute()}/mlflow.db"


class Tracker:
    """An MLflow run. Metrics are queued until the server has taken them, so a server that is away for a while loses none.

    MLflow cannot remove a point. So a step that is repeated after a failure keeps its first point of each metric.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri = uri
        self.run_id = run_id
        self._client = make_client(uri)
        self._queue: list[Any] = []
        self._known: set[tuple[str, int]] = set()
        self._tags: dict[str, str] = {}

    def recall(self) -> None:
        """Read which points the run has already. Raises MlflowException."""
        for key in self._client.get_run(self.run_id).data.metrics:
            self._known.update((key, point.step) for point in self._client.get_metric_history(self.run_id, key))

    def log(self, step: int, metrics: dict[str, float], time_ms: int | None = None) -> None:
        """Queue metrics of a step for the next `flush`. A metric that has a point of this step is left out.

        time_ms: UNIX time; by default the present.
        """
        from mlflow.entities import Metric

        at = int(time.time() * 1000) if time_ms is None else time_ms
        new = {key: value for key, value in metrics.items() if (key, step) not in self._known}
        self._known.update((key, step) for key in new)
        self._queue += [Metric(key, value, at, step) for key, value in new.items()]

    def flush(self) -> None:
        """Send the queue. Raises MlflowException where the server does not take it; the rest stays in the queue."""
        while self._queue:
            self._client.log_batch(self.run_id, metrics=self._queue[:MAX_METRICS_A_CALL])
            self._queue = self._queue[MAX_METRICS_A_CALL:]
        self.tag(self._tags)
        self._tags = {}

    def tag_later(self, tags: dict[str, str]) -> None:
        """Queue tags for the next `flush`."""
        self._tags |= tags

    def tag(self, tags: dict[str, str]) -> None:
        """Set tags of the MLflow run."""
        for key, value in tags.items():
            self._client.set_tag(self.run_id, key, value)

    def artifact(self, location: str | Path, folder: str | None = None) -> None:
        """Copy a file, or the files of a folder, to the artifacts of the MLflow run.

        location: path or URL.
        folder: below the artifacts; None for the top.
        Artifacts on S3 are written by `nev.storage`, since MLflow itself would need boto3.
        """
        root = self._client.get_run(self.run_id).info.artifact_uri
        with local_copy(str(location)) as path:
            if root.startswith("s3://"):
                parts = [folder] if folder else []
                upload(path, join(root, *parts) if path.is_dir() else join(root, *parts, path.name))
            elif path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), folder)
            else:
                self._client.log_artifact(self.run_id, str(path), folder)

    def read_artifact(self, name: str) -> bytes:
        """The bytes of an artifact of the MLflow run. Raises MlflowException or OSError where there is none."""
        root = self._client.get_run(self.run_id).info.artifact_uri
        if root.startswith("s3://"):
            fs, path = filesystem(join(root, name))
            return bytes(fs.cat_file(path))
        with tempfile.TemporaryDirectory() as folder:
            return Path(self._client.download_artifacts(self.run_id, name, folder)).read_bytes()

    def artifacts_below(self, folder: str) -> bool:
        """Whether the artifacts of the MLflow run lie on this machine, below `folder`."""
        place = _local_folder(self._client.get_run(self.run_id).info.artifact_uri)
        return place is not None and place.resolve().is_relative_to(Path(folder).resolve())

    def artifacts(self, files: list[str], checkpoint: str) -> str:
        """Copy files and a checkpoint to the artifacts of the MLflow run. Returns why they were not taken, else "".

        checkpoint: location of the checkpoint; also the value of the tag `nev.checkpoint`. Files that only a resumed run needs
        are not copied.
        """
        try:
            for file in files:
                self.artifact(file)
            self.tag({"nev.checkpoint": checkpoint})
            for name in list_files(checkpoint):
                if name not in RESUME_FILES:
                    self.artifact(join(checkpoint, name), "checkpoint")
        except Exception as error:  # noqa: BLE001 - MLflow's stores raise whatever their packages do, and training is done
            return f"{type(error).__name__}: {first_line(error)}"
        return ""

    def history(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric, by step."""
        points = sorted((point.step, point.value) for point in self._client.get_metric_history(self.run_id, key))
        return [step for step, _ in points], [value for _, value in points]

    def finish(self, status: str) -> bool:
        """Send the queue and end the MLflow run as FINISHED, FAILED or KILLED. Returns whether the server has answered.

        A server that does not answer is tried for a minute; once for KILLED, since the user waits.
        """
        from mlflow.exceptions import MlflowException

        try:
            for attempt in Retrying(
                retry=retry_if_exception_type((MlflowException, OSError)),
                wait=wait_exponential(max=10),
                stop=stop_after_delay(0 if status == "KILLED" else PATIENCE_S),
            ):
                with attempt:
                    self.flush()
                    self._client.set_terminated(self.run_id, status)
        except RetryError:
            return False
        return True


def open_run(
    uri: str,
    experiment: str,
    name: str,
    section: BaseModel,
    tags: dict[str, str],
    output: str,
    run_id: str | None = None,
) -> Tracker:
    """Continue the MLflow run `run_id` where this server has it, else create a run.

    experiment: name of the MLflow experiment.
    name: of a new run.
    section: a config, whose settings are the parameters of a new run.
    tags: of a new run; a continued run keeps its tags.
    Artifacts lie under `<output>/mlartifacts`, unless an MLflow server (http) has its own place for them.
    """
    client = make_client(uri)
    if run_id is not None and not _has_run(client, run_id):  # on another server, or deleted
        tags = {**tags, "nev.continues_run": run_id}
        run_id = None
    if run_id is None:
        tags = {**tags, "mlflow.runName": name, **git_tags()}
        run_id = client.create_run(_experiment(client, uri, experiment, output), tags=tags).info.run_id
        from mlflow.entities import Param

        client.log_batch(run_id, params=[Param(key, str(value)) for key, value in flatten(section).items()])
    client.update_run(run_id, status="RUNNING")
    tracker = Tracker(uri, run_id)
    tracker.recall()
    return tracker


def find_artifact_root(uri: str, experiment: str, run_id: str | None) -> str | None:
    """The URI below which the artifacts of a run lie, or will lie; None for an experiment that is yet to be made.

    run_id: None for a new run.
    Raises MlflowException where MLflow does not answer.
    """
    client = make_client(uri)
    if run_id is not None and _has_run(client, run_id):
        return str(client.get_run(run_id).info.artifact_uri)
    existing = client.get_experiment_by_name(experiment)
    return str(existing.artifact_location) if existing else None


def local_artifacts(uri: str, experiment: str, output: str, run_id: str | None) -> Path | None:
    """The folder of this machine in which the artifacts of a run lie, or will lie; None where they lie elsewhere.

    Arguments and errors as of `find_artifact_root`. output: place of the runs.
    """
    if root := find_artifact_root(uri, experiment, run_id):
        return _local_folder(root)
    return None if uri.startswith("http") else _local_folder(join(_url(output), "mlartifacts"))


def _local_folder(uri: str) -> Path | None:
    parts = urlsplit(uri)
    return Path(unquote(parts.path)) if parts.scheme in ("", "file") else None


def _has_run(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def git_tags() -> dict[str, str]:
    """The commit of this code, under MLflow's tag for it; empty outside a git checkout."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"mlflow.source.git.commit": result.stdout.strip()}


def _experiment(client: Any, uri: str, name: str, output: str) -> str:
    existing = client.get_experiment_by_name(name)
    if existing:
        return str(existing.experiment_id)
    location = None if uri.startswith("http") else join(_url(output), "mlartifacts")
    return str(client.create_experiment(name, artifact_location=location))


def _url(location: str) -> str:
    return location if "://" in location else Path(location).expanduser().absolute().as_uri()


def make_client(uri: str) -> Any:
    """Make MLflow's client of a URI. The folder of an SQLite file is made, too."""
    from mlflow import MlflowClient

    # Metrics that a server does not take are sent later, so no call tries for MLflow's default, four minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)
