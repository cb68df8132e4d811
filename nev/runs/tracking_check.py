"""What is wrong with MLflow, said before a run starts: its address, its driver, its rights, its experiment, and its files."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nev.common.errors import first_line
from nev.common.location import S3, hide_password
from nev.config.base import ConfigError
from nev.runs.tracking import find_artifact_root, make_client
from nev.storage.files import filesystem, join, upload

# For the check: a server that has just started may take seconds. MLflow's default, two minutes, is for files.
TIMEOUT, PROBE_S = "MLFLOW_HTTP_REQUEST_TIMEOUT", "20"
DRIVERS = {"MySQLdb": "mysqlclient", "psycopg2": "psycopg2-binary", "psycopg": "psycopg[binary]", "pyodbc": "pyodbc"}
REFUSED = re.compile(r"error code (401|403)")
DATABASE = re.compile(r"(sqlite|mysql|postgresql|mssql)(\+\w+)?://")
PROBE = "nev-check"  # beginning of the name of a file that is written and deleted


def check_tracking(uri: str, experiment: str | None = None, run_id: str | None = None) -> None:
    """Raise ConfigError where MLflow cannot be used as it is configured.

    experiment: name of the MLflow experiment, which must not be deleted, and whose files must be writable; None: not looked at.
    run_id: of the MLflow run that will be continued.
    """
    with _short_timeout(), _explained(uri):
        if not uri.startswith("http"):
            _check_database(uri)
        client = make_client(uri)
        client.search_experiments(max_results=1)
        known = client.get_experiment_by_name(experiment) if experiment else None
    if known and known.lifecycle_stage == "deleted":
        raise ConfigError(
            f"tracking.experiment: {experiment!r} was deleted at {uri}. Restore it (mlflow experiments restore --experiment-id "
            f"{known.experiment_id}), or give another name with --set tracking.experiment=..."
        )
    if experiment:
        with _short_timeout(), _explained(uri):
            root = find_artifact_root(uri, experiment, run_id)
        if root:
            check_artifacts(uri, root, experiment)


def check_artifacts(uri: str, root: str, experiment: str) -> None:
    """Raise ConfigError where a file cannot be written to a root of artifacts, by writing one."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"{PROBE}-{secrets.token_hex(4)}")  # runs may start together
        file.write_text("nev writes this file to see whether it can, and deletes it.\n", encoding="utf-8")
        try:
            with _short_timeout():
                _write_and_delete(uri, root, file)
        except Exception as error:  # MLflow's stores raise whatever their packages raise
            raise ConfigError(
                f"tracking: files of experiment {experiment!r} go to {root}, and cannot be written there "
                f"({type(error).__name__}: {first_line(error)}). Install what is missing, or mend the rights; or give an "
                "experiment that keeps its files elsewhere with --set tracking.experiment=..."
            ) from error


def _write_and_delete(uri: str, root: str, file: Path) -> None:
    if root.startswith(S3):  # by s3fs: MLflow itself would need boto3
        place = join(root, file.name)
        upload(file, place)
        fs, path = filesystem(place)
        with suppress(OSError):  # a store that keeps everything
            fs.rm_file(path)
        return
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    repository = get_artifact_repository(root, tracking_uri=uri)
    repository.log_artifact(str(file))  # type: ignore[no-untyped-call]
    with suppress(Exception):  # a store that keeps everything says so by an error of its own package
        repository.delete_artifacts(file.name)  # type: ignore[no-untyped-call]


def _check_database(uri: str) -> None:
    """Connect once: MLflow itself tries a database that does not answer for 100 s."""
    import sqlalchemy

    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    if not DATABASE.match(uri):  # MLflow has other places, too: a folder of files, databricks
        return
    engine = sqlalchemy.create_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn what MLflow raises into a ConfigError that says what to do."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    def refuse(problem: str, error: BaseException) -> Any:
        raise ConfigError(f"tracking.uri: {problem}") from error

    place = hide_password(uri)
    try:
        yield
    except ImportError as error:
        package = DRIVERS.get(error.name or "", error.name)
        refuse(f"{place} needs the driver {error.name}, which is not installed: pip install '{package}'", error)
    except ArgumentError as error:
        hint = "a file is sqlite:///mlflow.db, with three slashes, or sqlite:////FOLDER/mlflow.db with four"
        refuse(
            f"{place} is no address of a database ({hint if uri.startswith('sqlite:') else first_line(error)})", error
        )
    except (MlflowException, SQLAlchemyError, OSError) as error:
        code = REFUSED.search(str(error))
        if code and code[1] == "401":
            refuse(
                f"MLflow at {place} wants to know who you are (401): set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
                error,
            )
        if code:
            refuse(
                f"MLflow at {place} refuses this user (403): ask for the right to write, or set another "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
                error,
            )
        if "error code 404" in str(error):
            refuse(f"{place} answers, and is no MLflow (404): correct the address", error)
        refuse(
            f"MLflow at {place} does not answer ({first_line(error)}). Start it (mlflow server), or give another URI with "
            "--set tracking.uri=...",
            error,
        )


@contextmanager
def _short_timeout() -> Iterator[None]:
    """Let MLflow's requests end after PROBE_S, in the body of a `with`."""
    known = os.environ.get(TIMEOUT)
    os.environ[TIMEOUT] = PROBE_S
    try:
        yield
    finally:
        del os.environ[TIMEOUT]
        if known is not None:
            os.environ[TIMEOUT] = known
