"""The notebook runs from its first cell to its last, and its pictures come out."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quickstart_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEV_NOTEBOOK_WORK", str(tmp_path))
    monkeypatch.setenv("NEV_NOTEBOOK_PICTURES", "512")
    monkeypatch.setenv("NEV_NOTEBOOK_STEPS", "4")
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    drawn = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(drawn) >= 4, "the pictures, the curve and two searches"
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert (tmp_path / "runs" / "quickstart" / "checkpoints" / "step-00000004" / "state.json").exists()


def test_notebooks_hold_no_output() -> None:
    """Outputs would carry this machine's paths into the repository."""
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")], path.name
