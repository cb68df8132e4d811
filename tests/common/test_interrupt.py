"""Ctrl-C: a command says that it was interrupted and how to go on, exits with 130, and leaves no process."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import typer

from nev.common.cli import report_errors
from nev.config.experiment import Experiment
from nev.config.file import to_yaml
from nev.runs.manifest import list_checkpoints

ROOT = Path(__file__).parents[2]
WAIT_S = 200.0


def interrupted(command: list[str], ready: Callable[[], bool], folder: Path) -> tuple[int, str, str]:
    """Run a command in `folder`, send it SIGINT as soon as `ready`, and return its status, output and errors."""
    running = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + WAIT_S
        while not ready():
            assert running.poll() is None, running.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(signal.SIGINT)
        output, errors = running.communicate(timeout=WAIT_S)
    finally:
        running.kill()
    left = psutil.wait_procs(children, timeout=30)[1]
    assert not left, "processes are left over"
    return running.returncode, output, errors


def test_the_status_is_that_of_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, report_errors("The same command continues."):
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "interrupted. The same command continues.\n")


@pytest.mark.slow
def test_prepare_is_interrupted_and_goes_on(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "in" / str(number)).mkdir(parents=True)
        for picture in range(3000):
            (tmp_path / "in" / str(number) / f"{picture}.jpg").write_bytes(b"%d %d" % (number, picture))
    command = [sys.executable, str(ROOT / "pipelines/prepare.py"), "--source", "folder-classes", "--input", "in"]
    command += ["--template", "a {}", "--output", "out"]
    work = tmp_path / "out" / "_prepare"
    status, _, errors = interrupted(command, lambda: work.exists() and len(list(work.iterdir())) > 1, tmp_path)
    assert status == 130, errors
    assert errors.endswith("interrupted. The same command continues from the finished parts.\n")
    assert not list((tmp_path / "out").glob("*.parquet"))
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=WAIT_S)
    assert again.returncode == 0, again.stderr
    assert [shard.name for shard in sorted((tmp_path / "out").iterdir())] == ["00000.parquet", "00001.parquet"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_is_interrupted_and_leaves_its_checkpoint(tiny: Callable[..., Experiment], tmp_path: Path) -> None:
    config = tiny(train__steps=100_000, train__checkpoint_every=5)
    (tmp_path / "tiny.yaml").write_text(to_yaml(config))
    command = [sys.executable, str(ROOT / "pipelines/train.py"), "--config", "tiny.yaml"]
    run = f"{config.output}/{config.name}"
    status, output, errors = interrupted(command, lambda: bool(list_checkpoints(run)), tmp_path)
    assert status == 130, output + errors
    assert errors.endswith("interrupted. The same command continues from the latest checkpoint.\n")
    assert "Traceback" not in output + errors
    assert list_checkpoints(run)
