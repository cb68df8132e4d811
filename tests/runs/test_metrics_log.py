"""A run's record of its metrics that is damaged: an error that names the file, and an evaluation that keeps its result."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from nev.eval.evaluate_suite import read_curve, track
from nev.runs.metrics_log import (
    MetricPoint,
    load_mlflow_run_id,
    read_points,
    save_mlflow_run_id,
    write_points,
    write_validation,
)
from nev.storage.files import StorageError

POINT = MetricPoint(2, 20, {"loss": 2.0})


def test_what_was_written_is_read(tmp_path: Path) -> None:
    run = str(tmp_path)
    write_points(run, 2, [POINT])
    write_validation(run, MetricPoint(2, 30, {"top1": 0.5}))
    assert read_points(run, 1) == []
    assert read_points(run, 2) == [POINT, MetricPoint(2, 30, {"top1": 0.5})]


@pytest.mark.parametrize(
    "content", [b"[2, 20, {", b"\xff\xfe", b"7\n", b"[2]\n", b"{}\n", b'[2, 20, {"loss": null}]\n', b"[2, 20, []]\n"]
)
def test_a_damaged_log_is_a_storage_error(content: bytes, tmp_path: Path) -> None:
    run = str(tmp_path)
    write_points(run, 2, [POINT])
    (tmp_path / "metrics/step-00000004.jsonl").write_bytes(content)
    assert read_points(run, 2) == [POINT]
    with pytest.raises(
        StorageError, match=r"metrics/step-00000004\.jsonl is damaged \(.*or remove it: the metrics of its"
    ):
        read_points(run, 4)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"7"])
def test_a_damaged_run_id_is_a_storage_error(content: bytes, tmp_path: Path) -> None:
    run = str(tmp_path)
    save_mlflow_run_id(run, "abc")
    assert load_mlflow_run_id(run) == "abc"
    (tmp_path / "mlflow.json").write_bytes(content)
    with pytest.raises(
        StorageError, match=r"mlflow\.json is damaged \(.*remove it: the next start of the run then begins"
    ):
        load_mlflow_run_id(run)


def test_an_evaluation_keeps_its_result_without_curve_and_upload(tmp_path: Path) -> None:
    location = f"{tmp_path}/checkpoints/step-00000002"
    console = Console(file=io.StringIO(), width=400)
    write_points(str(tmp_path), 2, [POINT])
    assert read_curve(location, 2, console) == [POINT]
    assert read_curve("elsewhere", 2, console) == []
    (tmp_path / "metrics/step-00000002.jsonl").write_bytes(b"{")
    (tmp_path / "mlflow.json").write_bytes(b"{")
    assert read_curve(location, 2, console) == []
    result: Any = SimpleNamespace(step=2)
    embedder: Any = SimpleNamespace(location=location)
    track(result, embedder, ["page.html"], console)
    first, second = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "no curve: " in first
    assert "step-00000002.jsonl is damaged" in first
    assert "not logged to MLflow (" in second
    assert "mlflow.json is damaged" in second
    assert "the results lie in page.html" in second
