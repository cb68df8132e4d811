"""When the loss takes its kernels, and when its tiles: by device, dtype, compiler and what the machine has."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.losses import inputs, log_scale_of
from torch import Tensor
from torch._subclasses import FakeTensorMode

from nev.losses import fused, tiles
from nev.losses.contrastive import contrastive_loss
from nev.losses.matryoshka import matryoshka_loss


@pytest.fixture
def capable(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine with an H100, as far as `usable` asks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fused, "find_spec", lambda name: name)
    monkeypatch.setattr(fused.shutil, "which", lambda name: name)
    monkeypatch.setattr(fused.sysconfig, "get_path", lambda *names: Path(__file__).parent)
    monkeypatch.setattr(Path, "is_file", lambda path: path.name == "Python.h")
    fused._compiles.cache_clear()
    yield monkeypatch
    fused._compiles.cache_clear()


def on_gpu(dtype: torch.dtype = torch.float32) -> Tensor:
    with FakeTensorMode():
        return torch.empty(2, 3, device="cuda", dtype=dtype)


def test_float32_on_a_gpu_goes_through_the_kernels(capable: pytest.MonkeyPatch) -> None:
    assert fused.usable(on_gpu())
    assert not fused.usable(on_gpu(torch.float64))
    assert not fused.usable(torch.empty(2, 3))


@pytest.mark.parametrize("lacks", ["triton", "compiler", "headers", "NVIDIA", "a GPU of today"])
def test_a_machine_that_cannot_compile_takes_the_tiles(capable: pytest.MonkeyPatch, lacks: str) -> None:
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
    assert not fused.usable(on_gpu())


@pytest.mark.parametrize("by_kernels", [True, False])
def test_the_loss_asks_which_way(monkeypatch: pytest.MonkeyPatch, by_kernels: bool) -> None:
    asked: list[Tensor] = []

    def usable(x: Tensor) -> bool:
        asked.append(x)
        return by_kernels

    class Taken(Exception):
        pass

    def taken(*args: Any) -> Any:
        raise Taken

    monkeypatch.setattr(fused, "usable", usable)
    monkeypatch.setattr(fused if by_kernels else tiles, "statistics", taken)
    with pytest.raises(Taken):
        contrastive_loss(*inputs(dtype=torch.float32), log_scale_of(dtype=torch.float32))
    assert [(x.dtype, x.shape) for x in asked] == [(torch.float32, (16, 7))]


def test_triton_is_not_imported_where_it_is_not_used() -> None:
    code = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "from nev.losses.contrastive import contrastive_loss\n"
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
