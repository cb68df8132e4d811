"""nev: give a locked text embedder eyes.

The public names are imported when they are used, so that `import nev` alone costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from nev.common.imports import when_imported
from nev.common.version import __version__

__all__ = ["Experiment", "Model", "__version__", "load", "load_config", "run_experiment"]

if TYPE_CHECKING:
    from nev.config.experiment import Experiment
    from nev.config.file import load as load_config
    from nev.inference.load import load
    from nev.inference.model import Model
    from nev.train.experiment import run_experiment
else:  # hidden from type checkers, for which a module with __getattr__ has every name
    _HOMES = {
        "Experiment": ("nev.config.experiment", "Experiment"),
        "Model": ("nev.inference.model", "Model"),
        "load": ("nev.inference.load", "load"),
        "load_config": ("nev.config.file", "load"),
        "run_experiment": ("nev.train.experiment", "run_experiment"),
    }

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, attribute = _HOMES[name]
        return getattr(import_module(module), attribute)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


def _register_with_transformers() -> None:
    """Let transformers' Auto classes open what `nev export --format hf` writes, without remote code."""
    from nev.export.hf_model import register

    register()


# Not now: transformers takes seconds to import, and most uses of nev need no model of transformers.
when_imported("transformers.models.auto.modeling_auto", _register_with_transformers)
