"""Runs notebooks as a reader does, and gives what their cells show."""

from __future__ import annotations

from typing import Any

import nbformat
from nbclient import NotebookClient

from helpers.docs import ROOT


def run_notebooks(**settings: dict[str, str]) -> dict[str, list[Any]]:
    """Run notebooks in one kernel, which keeps libraries and Ray; each begins without the names of the one before.

    settings: environment variables of each, by the name of its file in notebooks/.
    Returns the outputs of each, by that name. Raises CellExecutionError where a cell raises.
    """
    client = NotebookClient(
        nbformat.v4.new_notebook(), timeout=500, resources={"metadata": {"path": str(ROOT / "notebooks")}}
    )
    shown = {}
    with client.setup_kernel():
        for name, variables in settings.items():
            client.nb = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
            begin = f"%reset -f\nimport os\nos.environ.update({variables!r})\ndel os"
            client.nb.cells.insert(0, nbformat.v4.new_code_cell(begin))
            client.execute(cleanup_kc=False)
            shown[name] = [output for cell in client.nb.cells for output in cell.get("outputs", [])]
    return shown


def read_values(outputs: list[Any]) -> list[str]:
    """The values of the cells' last lines, as Python writes them."""
    return [output["data"]["text/plain"] for output in outputs if output["output_type"] == "execute_result"]


def count_pictures(outputs: list[Any]) -> int:
    """Number of pictures that the cells show."""
    return sum("image/png" in output.get("data", {}) for output in outputs)
