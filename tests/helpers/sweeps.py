"""A small sweep over the experiment of `tiny`."""

from __future__ import annotations

from typing import Any

from mlflow import MlflowClient

from nev.config.file import parse
from nev.sweep.config import Sweep


def raw(base: str, **settings: object) -> dict[str, Any]:
    return {
        "name": "sizes",
        "base": base,
        "axes": {"train.global_batch": [32, 64, 128]},
        "seeds": [0, 1],
        "samples": 640,
        "metrics": ["zero_shot/top1"],
        **settings,
    }


def sweep(base: str, **settings: object) -> Sweep:
    return parse(Sweep, raw(base, **settings))


def read_runs(uri: str) -> tuple[list[Any], list[Any]]:
    """The parents and the children that MLflow has."""
    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("nev").experiment_id])
    parents = [run for run in runs if run.data.tags.get("nev.kind") == "sweep"]
    return parents, [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
