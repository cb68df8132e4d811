"""The base of all schemas: frozen sections in which an unknown key is an error."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from nev.common.errors import NevError

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Deviation = Annotated[float, Field(gt=0.0)]


def _without_password(location: str) -> str:
    if "@" in location and urlsplit(location).password is not None:
        raise ValueError(
            "leave the password out: a config is written to checkpoints, to MLflow and to the console. Give S3's password in "
            "AWS_SECRET_ACCESS_KEY or a profile, a tracking server's in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            "PostgreSQL's in PGPASSWORD or ~/.pgpass"
        )
    return location


Location = Annotated[str, AfterValidator(_without_password)]  # a path or URL


class ConfigError(NevError, ValueError):
    """A configuration that cannot run. The message says what, where and what to do."""


class Section(BaseModel):
    """A frozen group of settings in which an unknown key is an error. The docstring under a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
