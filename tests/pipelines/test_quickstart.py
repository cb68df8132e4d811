"""`make quickstart`: from nothing to the summary. Its notebook is in test_notebooks.py."""

from __future__ import annotations

import pytest
from helpers.quickstart import Quickstart


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_from_nothing_to_the_summary(quickstart: Quickstart) -> None:
    process = quickstart.process
    assert process.returncode == 0, process.stdout + process.stderr
    assert not process.stderr.strip(), "libraries keep their chatter to themselves"
    for shown in ("zero_shot/top1", "retrieval/text_to_image/r10", "loss.png", "retrieval.png", "mlflow ui --backend"):
        assert shown in process.stdout
    run = quickstart.folder / "runs" / "quickstart"
    for picture in ("loss.png", "retrieval.png", "classes.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    assert (quickstart.folder / "runs" / "mlflow.db").exists()
