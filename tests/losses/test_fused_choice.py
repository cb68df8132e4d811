"""When the loss takes its kernels, and when its tiles: by device, dtype, compiler and what the machine has."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.losses import inputs, log_scale_of
from pydantic import ValidationError
from torch._subclasses import FakeTensorMode

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.file import parse
from nev.config.model import Loss
from nev.losses import fused, tiles
from nev.losses.contrastive import Kernel, contrastive_loss
from nev.losses.matryoshka import matryoshka_loss


@pytest.fixture
def capable(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with an H100, as far as `unsupported_reason` looks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fused, "find_spec", lambda name: name)
    monkeypatch.setattr(fused.shutil, "which", lambda name: name)
    monkeypatch.setattr(fused.sysconfig, "get_path", lambda *names: Path(__file__).parent)
    monkeypatch.setattr(Path, "is_file", lambda path: path.name == "Python.h")
    return monkeypatch


GPU = torch.device("cuda", 0)


def test_a_gpu_of_today_runs_the_kernels(capable: pytest.MonkeyPatch) -> None:
    assert fused.unsupported_reason(GPU) is None
    assert fused.unsupported_reason(torch.device("cpu")) == "the device is cpu, not an NVIDIA GPU"


@pytest.mark.parametrize(
    ("lacks", "reason"),
    [
        ("triton", "the Python package triton is not installed"),
        ("compiler", "no C compiler"),
        ("headers", r"Python\.h"),
        ("NVIDIA", "not an NVIDIA GPU"),
        ("a GPU of today", r"7\.5, below 8\.0"),
    ],
)
def test_what_a_machine_lacks_is_named(capable: pytest.MonkeyPatch, lacks: str, reason: str) -> None:
    match lacks:
        case "triton":
            capable.setattr(fused, "find_spec", lambda name: None)
        case "compiler":
            capable.setattr(fused.shutil, "which", lambda name: None)
            capable.delenv("CC", raising=False)
        case "headers":
            capable.setattr(Path, "is_file", lambda path: False)
        case "NVIDIA":
            capable.setattr(torch.version, "hip", "7.0")
        case _:
            capable.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert re.search(reason, fused.unsupported_reason(GPU) or "")


@pytest.mark.parametrize("kernel", ["tiles", "fused"])
def test_the_loss_goes_the_way_that_it_is_given(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    class Taken(Exception):
        pass

    def taken(*args: Any) -> Any:
        raise Taken

    monkeypatch.setattr(fused if kernel == "fused" else tiles, "statistics", taken)
    with pytest.raises(Taken):
        contrastive_loss(*inputs(dtype=torch.float32), log_scale_of(dtype=torch.float32), kernel=kernel)


def test_the_tiles_are_the_default_and_the_kernels_want_a_gpu() -> None:
    assert Loss().kernel == "tiles"
    for loss in ({"kind": "sigmoid"}, {"matryoshka": {4: 1.0}}):
        with pytest.raises(ValidationError, match="fused is for kind: softmax without matryoshka"):
            Loss(kernel="fused", **loss)
    raw = {
        "name": "x", "data": {"train": "nowhere"}, "vision": {"trunk": "vit_tiny_patch16_224"}, "optim": {"lr": 1e-3},
        "train": {"global_batch": 256, "steps": 1}, "loss": {"kernel": "fused"},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"loss\.kernel: fused needs NVIDIA GPUs"):
        parse(Experiment, raw)
    assert parse(Experiment, raw, ["workers.gpus=1"]).loss.kernel == "fused"


def test_triton_is_not_imported_where_it_is_not_used() -> None:
    code = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "from nev.losses.contrastive import Kernel, contrastive_loss\n"
        "x = torch.eye(4); print(contrastive_loss(x, x, torch.tensor(0.)).correct.item())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "4\n"


@pytest.mark.parametrize("nested", [False, True])
def test_tiles_on_a_gpu_walk_once_for_the_statistics(nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    original = tiles.LogSums.update

    def see(self: tiles.LogSums, *args: Any) -> None:
        seen.append(self.one_shift)
        original(self, *args)

    monkeypatch.setattr(tiles.LogSums, "update", see)
    with FakeTensorMode(), torch.no_grad():
        x, log_scale = torch.empty(8, 3, device="cuda", dtype=torch.float64), torch.empty((), device="cuda")
        if nested:
            matryoshka_loss(x, x, log_scale, {2: 1.0, 3: 1.0})
        else:
            contrastive_loss(x, x, log_scale)
    assert seen == [False] * (1 + nested)
