"""The hook of the docs site that writes the config reference, and the schemas that the reference has."""

from __future__ import annotations

import functools
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
SCHEMAS = ("nev.config.experiment.Experiment", "nev.sweep.config.Sweep", "nev.eval.suite.schema.Suite")


@functools.cache
def config_reference() -> ModuleType:
    """The module `docs/hooks/config_reference.py`, which mkdocs loads by its path."""
    spec = spec_from_file_location("config_reference", ROOT / "docs/hooks/config_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
