"""`make quickstart` as a newcomer's shell runs it, at a small size: from nothing to the summary."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_from_nothing_to_the_summary_and_again(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "pipelines" / "quickstart.py"),
        "--config",
        str(ROOT / "configs/quickstart.yaml"),
    ]
    command += ["--train", "512", "--val", "64", "--set", "train.steps=8", "--set", "train.eval_every=8"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=400)
    assert first.returncode == 0, first.stdout + first.stderr
    assert not first.stderr.strip(), "libraries keep their chatter to themselves"
    for shown in ("zero_shot/top1", "retrieval/text_to_image/r10", "loss.png", "retrieval.png", "mlflow ui --backend"):
        assert shown in first.stdout
    run = tmp_path / "runs" / "quickstart"
    for picture in ("loss.png", "retrieval.png", "classes.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "runs" / "mlflow.db").exists()

    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=400)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(list((run / "checkpoints").iterdir())) == 1, "a finished run is not trained again"
