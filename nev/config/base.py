"""The base of all schemas: frozen sections in which an unknown key is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from nev.common.errors import NevError
from nev.common.location import check_location

MOST = 2**53  # counts are float64 in metrics and in MLflow
Positive = Annotated[int, Field(gt=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveShare = Annotated[float, Field(gt=0.0, le=1.0)]
Deviation = Annotated[float, Field(gt=0.0, le=1e3)]


def _without_password(location: str) -> str:
    if "@" in location and urlsplit(location).password is not None:
        raise ValueError(
            "leave the password out: a config is written to checkpoints, to MLflow and to the console. Give S3's password in "
            "AWS_SECRET_ACCESS_KEY or a profile, a tracking server's in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            "PostgreSQL's in PGPASSWORD or ~/.pgpass"
        )
    return location


Address = Annotated[str, AfterValidator(_without_password)]  # of a server
Location = Annotated[Address, AfterValidator(check_location)]


class ConfigError(NevError, ValueError):
    """A configuration that cannot run. The message says what, where and what to do."""


class Section(BaseModel):
    """A frozen group of settings in which an unknown key is an error. The docstring under a field is its description."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, serialize_by_alias=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` and `false` where a number is needed: pydantic would take them for 1 and 0."""
        if _has_truth(value) and info.field_name:
            kinds = list_kinds(cls.model_fields[info.field_name].annotation)
            if kinds & {int, float} and not kinds & {bool, Any}:
                raise ValueError("a number is needed, not true or false")
        return value


def _has_truth(value: Any) -> bool:
    """Whether a value is true or false, or holds one at any depth."""
    if isinstance(value, Mapping):
        return any(map(_has_truth, value.values()))
    return any(map(_has_truth, value)) if isinstance(value, list | tuple) else isinstance(value, bool)


def list_kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    inner = get_args(annotation)
    return set().union(*map(list_kinds, inner)) if inner else {annotation}
