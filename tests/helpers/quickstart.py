"""The quickstart's command as a newcomer's shell runs it, at a small size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from helpers.docs import ROOT


class Quickstart(NamedTuple):
    """folder: holds pictures/ and runs/. pictures: of the training set. steps: of the run. process: the finished command."""

    folder: Path
    pictures: int
    steps: int
    process: subprocess.CompletedProcess[str]


def run_quickstart(folder: Path, pictures: int = 256, steps: int = 10) -> Quickstart:
    settings = {
        "output": folder / "runs",
        "data.train": folder / "pictures" / "train",
        "data.val": folder / "pictures" / "val",
        "eval.zero_shot.classes": folder / "pictures" / "classes.txt",
        "train.steps": steps,
        "train.eval_every": steps,
        "workers.count": 1,
    }
    command = [sys.executable, str(ROOT / "pipelines/quickstart.py"), "--config", str(ROOT / "configs/quickstart.yaml")]
    command += ["--train", str(pictures), "--val", "64"]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=400)
    return Quickstart(folder, pictures, steps, process)
