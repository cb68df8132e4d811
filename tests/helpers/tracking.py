"""An experiment for the tests of MLflow, which train nothing."""

from __future__ import annotations

from typing import Any

from nev.config.experiment import Experiment


def experiment(**settings: Any) -> Experiment:
    raw = {
        "name": "tracked",
        "data": {"train": "x"},
        "vision": {"trunk": "vit_tiny_patch16_224"},
        "optim": {"lr": 1e-3},
        "train": {"global_batch": 256, "steps": 1},
    }
    return Experiment.model_validate({**raw, **settings})
