"""Notebooks: what is read from MLflow alone (the quickstart's is in test_quickstart.py), and what none may hold."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from nev.config.file import load, parse
from nev.runs.tracking import open_run
from nev.sweep.config import Sweep
from nev.sweep.report import write_report
from nev.sweep.results import Outcome, TrialResult
from nev.sweep.trials import expand_arms

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_any_sweep_is_read_from_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, metric = [64, 128, 256, 512], "zero_shot/top1"
    raw = {"name": "made-up", "question": "How large?", "base": "b", "axes": {"train.global_batch": sizes}}
    sweep = parse(Sweep, {**raw, "seeds": [0, 1, 2], "samples": 1000, "metrics": [metric]})
    uri, output = f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path)
    parent = open_run(uri, "nev", "made-up", sweep, {"nev.kind": "sweep", "nev.sweep": "made-up"}, output)
    results = [
        TrialResult(
            name=f"{arm}-{seed}",
            arm=arm,
            seed=seed,
            metrics={metric: 0.1 + sizes.index(int(arm[0][1])) / 10 + seed / 100 * float(arm[0][1])},
            samples=1000,
            run_id="",
            seconds=1.0,
        )
        for arm, _ in expand_arms(sweep)
        for seed in sweep.seeds
    ]
    for file in write_report(
        Outcome(sweep, results, {}), load(ROOT / "configs" / "quickstart.yaml"), str(tmp_path / "made-up")
    ):
        parent.artifact(file)
    monkeypatch.setenv("NEV_NOTEBOOK_MLFLOW", uri)
    monkeypatch.setenv("NEV_NOTEBOOK_SWEEP", "made-up")
    notebook = nbformat.read(ROOT / "notebooks" / "ablations.ipynb", as_version=4)
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    outputs = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "'12 of 12 trials are finished'" in [data.get("text/plain") for data in outputs]
    assert sum("image/png" in data for data in outputs) == 1
    (said,) = (data["text/markdown"] for data in outputs if "text/markdown" in data)
    assert "From train.global_batch 64 to 128: not distinguishable at this budget." in said


def test_notebooks_hold_no_output() -> None:
    """Outputs would carry this machine's paths into the repository."""
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")], path.name
