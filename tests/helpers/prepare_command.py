"""`nev prepare` as a user runs it."""

from __future__ import annotations

import re

from typer.testing import CliRunner

from nev.commands.main import make_pipeline


def prepare(*args: object, code: int = 0) -> str:
    """Run the command; return what it printed, white space and table lines squeezed."""
    result = CliRunner().invoke(make_pipeline("prepare"), [str(arg) for arg in args], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return re.sub(r"[\s│]+", " ", result.output)
