"""Registers an exported model in the model registry of MLflow."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nev.common.errors import first_line
from nev.config.model_spec import ModelError
from nev.storage.files import local_copy

EXPERIMENT = "nev export"  # of MLflow, to which the models belong
NAME = re.compile(r"[^/:'\"%]+")  # what MLflow takes as the name of a model
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
# Through another database's address, MLflow would leave the files in the working folder of this machine.
ADDRESSES = ("http://", "https://", "sqlite:///")


def check_register(name: str, uri: str | None) -> str:
    """Check before an export that MLflow answers. Returns its URI.

    name: for the model. uri: of MLflow: http://HOST:PORT, or sqlite:///FILE.
    Raises ModelError where there is no URI, where MLflow does not answer, or where it does not take the name.
    """
    if not uri:
        raise ModelError(f"register {name}: give MLflow's address by --tracking-uri, or in MLFLOW_TRACKING_URI")
    if not uri.startswith(ADDRESSES):
        kind = uri.partition(":")[0]
        raise ModelError(
            f"register {name}: --tracking-uri {kind}:... is no MLflow server: give http://HOST:PORT, or sqlite:///FILE"
        )
    if not NAME.fullmatch(name):
        raise ModelError(f"register {name!r}: a name has no slash, colon, quote or percent sign")
    with _errors_as(f"register {name}", uri) as client:
        client.search_registered_models(f"name = '{name}'", max_results=1)
    return uri


def register(location: str, name: str, uri: str) -> str:
    """Upload a folder of the format `mlflow`, as it is, and register it. Returns its URI in the registry, models:/NAME/VERSION.

    location: a folder, or a prefix on S3. name: of the model, which gets a new version if it exists. uri: of MLflow.
    Raises ModelError where MLflow refuses; the exported folder stays.
    """
    with (
        local_copy(location) as folder,
        _errors_as(f"{location} is written, but it cannot be registered", uri) as client,
    ):
        model = client.create_logged_model(_find_experiment(client, uri), "nev")
        client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, "READY")
        if not client.search_registered_models(f"name = '{name}'", max_results=1):
            client.create_registered_model(name)
        version = client.create_model_version(name, model.artifact_location, model_id=model.model_id)
    return f"models:/{name}/{version.version}"


def _find_experiment(client: Any, uri: str) -> str:
    """The id of the experiment, which is made where there is none. With an SQLite file, its artifacts lie beside that file."""
    if existing := client.get_experiment_by_name(EXPERIMENT):
        return str(existing.experiment_id)
    file = uri.removeprefix("sqlite:///")
    place = None if file == uri else (Path(file).absolute().parent / "mlartifacts").as_uri()
    return str(client.create_experiment(EXPERIMENT, artifact_location=place))


@contextmanager
def _errors_as(failed: str, uri: str) -> Iterator[Any]:
    """A client of MLflow, whose errors become a ModelError. failed: beginning of the message."""
    import mlflow
    from mlflow.exceptions import MlflowException

    retries = os.environ.get(RETRIES)
    os.environ.setdefault(RETRIES, "1")  # not four minutes
    before: Any = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)  # a client with a URI of its own would still look up logged models at MLflow's
    try:
        yield mlflow.MlflowClient()
    except (MlflowException, OSError, ImportError) as error:  # ImportError: of boto3, for artifacts on S3
        raise ModelError(f"{failed}: MLflow at {uri}: {first_line(error)}") from error
    finally:
        mlflow.set_tracking_uri(before)
        if retries is None:
            del os.environ[RETRIES]
