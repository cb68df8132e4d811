"""pipelines/prepare.py as a user runs it."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

from typer.testing import CliRunner

spec = importlib.util.spec_from_file_location("prepare_pipeline", Path(__file__).parents[2] / "pipelines/prepare.py")
assert spec
assert spec.loader
pipeline = importlib.util.module_from_spec(spec)
sys.modules["prepare_pipeline"] = pipeline
spec.loader.exec_module(pipeline)


def prepare(*args: object, code: int = 0) -> str:
    """Run the command; return what it printed, white space and table lines squeezed."""
    result = CliRunner().invoke(pipeline.app, [str(arg) for arg in args], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return re.sub(r"[\s│]+", " ", result.output)
