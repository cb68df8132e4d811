"""`make quickstart` as a newcomer's shell runs it, at a small size: from nothing to the summary; and its notebook."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_from_nothing_to_the_summary_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = tmp_path / "pictures"
    settings = {
        "output": tmp_path / "runs",
        "data.train": pictures / "train",
        "data.val": pictures / "val",
        "eval.zero_shot.classes": pictures / "classes.txt",
        "train.steps": 8,
        "train.eval_every": 8,
    }
    command = [sys.executable, str(ROOT / "pipelines/quickstart.py"), "--config", str(ROOT / "configs/quickstart.yaml")]
    command += ["--train", "512", "--val", "64"]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=400)
    assert first.returncode == 0, first.stdout + first.stderr
    assert not first.stderr.strip(), "libraries keep their chatter to themselves"
    for shown in ("zero_shot/top1", "retrieval/text_to_image/r10", "loss.png", "retrieval.png", "mlflow ui --backend"):
        assert shown in first.stdout
    run = tmp_path / "runs" / "quickstart"
    for picture in ("loss.png", "retrieval.png", "classes.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "runs" / "mlflow.db").exists()

    # The notebook has the same settings, so it finds the run finished, and shows it.
    monkeypatch.setenv("NEV_NOTEBOOK_WORK", str(tmp_path))
    monkeypatch.setenv("NEV_NOTEBOOK_STEPS", "8")
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    drawn = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(drawn) >= 4, "the pictures, the curve and two searches"
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert len(list((run / "checkpoints").iterdir())) == 1, "a finished run is not trained again"
