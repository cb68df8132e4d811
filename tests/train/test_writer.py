"""Checkpoints written behind the steps: what the loop waits for, and storage that refuses."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import Reports
from torch import nn

from nev.config.train import Optim
from nev.runs import checkpoint, manifest
from nev.runs.manifest import CheckpointState, list_checkpoints, verify
from nev.runs.metrics_log import MetricPoint, read_points
from nev.storage.files import StorageError
from nev.train.core.optim import make_optimizer
from nev.train.core.rng import gather_rng
from nev.train.core.state_dict import Tensors, gather_tensors
from nev.train.worker import checkpointer as writer
from nev.train.worker.checkpointer import AsyncCheckpointWriter, CheckpointNotSaved, Snapshot

CPU = torch.device("cpu")
Refuse = Callable[[int], None]


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    optimizer = make_optimizer(model, Optim(lr=0.1))
    model(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    return model, optimizer


def snapshot(step: int, tensors: Tensors | None = None) -> Snapshot:
    state = CheckpointState(step, {}, {}, {}, world_size=1, bad_rows=0, history={})
    return Snapshot(
        state, tensors or gather_tensors(*trained()), gather_rng(CPU, 1), {}, [MetricPoint(step, 7, {"loss": 1.0})]
    )


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Makes the next so many files a full disk."""
    left = [0]
    whole = checkpoint.write_atomic

    def write(location: str, data: bytes) -> None:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), location)
        whole(location, data)

    monkeypatch.setattr(checkpoint, "write_atomic", write)
    return lambda times: left.__setitem__(0, times)


def steps_of(run: Path) -> list[int]:
    return [int(one.rsplit("-", 1)[1]) for one in list_checkpoints(str(run))]


def test_the_loop_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, go_on = threading.Event(), threading.Event()
    whole = checkpoint.write_atomic

    def slow(location: str, data: bytes) -> None:
        reached.set()
        assert go_on.wait(60)
        whole(location, data)

    monkeypatch.setattr(checkpoint, "write_atomic", slow)
    told = Reports()
    own = AsyncCheckpointWriter(str(tmp_path), 2, None, told)
    own.wait()
    own.write(snapshot(1))  # it comes back while the disk has nothing
    assert reached.wait(60)
    assert steps_of(tmp_path) == []
    go_on.set()
    own.wait()  # now it waits: the memory of the first snapshot is needed
    assert steps_of(tmp_path) == [1]
    own.write(snapshot(2))
    own.close()
    assert steps_of(tmp_path) == [1, 2]
    assert told.metrics[1]["checkpoint_write_s"] > 0
    assert not told.notes


def test_the_copy_is_made_in_the_same_memory_and_the_step_may_go_on() -> None:
    model, optimizer = trained()
    tensors = gather_tensors(model, optimizer)
    before = {name: tensor.data_ptr() for name, tensor in tensors.model.items()}
    kept = tensors.model["weight"].clone()
    with torch.no_grad():
        model.weight += 1  # type: ignore[operator]
    assert torch.equal(tensors.model["weight"], kept), "the snapshot is no view of the weights"
    again = gather_tensors(model, optimizer, into=tensors)
    assert {name: tensor.data_ptr() for name, tensor in again.model.items()} == before
    assert torch.equal(again.model["weight"], model.weight)


@pytest.mark.slow
def test_storage_that_refuses_is_asked_again(tmp_path: Path, refuse: Refuse) -> None:
    told = Reports()
    own = AsyncCheckpointWriter(str(tmp_path), 2, None, told)
    refuse(2)
    own.write(snapshot(1))
    own.close()
    assert steps_of(tmp_path) == [1]
    verify(list_checkpoints(str(tmp_path))[0])
    assert len(told.notes) == 1, "it is told once"
    assert "step-00000001/model.safetensors cannot be written" in told.notes[0]
    assert "No space left on device" in told.notes[0]
    assert "training continues" in told.notes[0]


def test_a_refused_checkpoint_gives_way_to_a_newer_one_and_no_point_is_lost(tmp_path: Path, refuse: Refuse) -> None:
    told = Reports()
    own = AsyncCheckpointWriter(str(tmp_path), 2, None, told)
    own.write(snapshot(1))
    own.wait()
    refuse(10**6)
    own.write(snapshot(2))
    own.wait()
    refuse(0)
    own.write(snapshot(3))
    own.close()
    assert steps_of(tmp_path) == [1, 3]
    assert [point.step for point in read_points(str(tmp_path), 3)] == [1, 2, 3]
    assert read_points(str(tmp_path), 1) == [MetricPoint(1, 7, {"loss": 1.0})]


def test_an_older_one_that_cannot_go_does_not_cost_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Any] = []
    save = checkpoint.save

    def once(*arguments: Any) -> str:
        saved.append(arguments)
        return save(*arguments)

    def refuses(location: str) -> None:
        raise StorageError(f"{location} cannot be removed (not now)")

    told = Reports()
    own = AsyncCheckpointWriter(str(tmp_path), 1, None, told)
    own.write(snapshot(1))
    own.wait()
    with monkeypatch.context() as away:
        away.setattr(checkpoint, "save", once)
        away.setattr(manifest, "remove_checkpoint", refuses)
        own.write(snapshot(2))
        own.wait()
    assert len(saved) == 1
    assert steps_of(tmp_path) == [1, 2]
    assert len(told.notes) == 1
    assert "older checkpoints could not be removed: " in told.notes[0]
    own.write(snapshot(3))
    own.close()
    assert steps_of(tmp_path) == [3]


def test_a_last_checkpoint_that_cannot_be_kept_is_an_error(
    tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "LAST_S", 0.2)
    own = AsyncCheckpointWriter(str(tmp_path), 2, None, Reports())
    refuse(10**6)
    own.write(snapshot(5))
    with pytest.raises(
        CheckpointNotSaved, match=r"No space left on device.*The same command continues from the checkpoint before"
    ) as caught:
        own.close()
    assert caught.value.step == 5


def test_what_is_no_refusal_of_storage_comes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(checkpoint, "save", broken)
    own = AsyncCheckpointWriter(str(tmp_path), 2, None, Reports())
    own.write(snapshot(1))
    with pytest.raises(RuntimeError, match="a bug"):
        own.wait()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "nev-test", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes(1_000_000))
    told = Reports()
    own = AsyncCheckpointWriter(str(small_disk), 1, None, told)
    own.write(snapshot(1))
    own.wait()
    assert steps_of(small_disk) == []
    assert "No space left on device" in told.notes[0]
    filler.unlink()
    own.write(snapshot(2))
    own.close()
    assert steps_of(small_disk) == [2]
    verify(list_checkpoints(str(small_disk))[0])
