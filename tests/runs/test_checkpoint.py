"""Checkpoints: complete or absent, bit for bit, nothing pickled, damage and other runs refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import load_checkpoint
from torch import Tensor, nn

from nev.config.train import Optim
from nev.runs import checkpoint, manifest
from nev.runs.manifest import CheckpointError, CheckpointState
from nev.train.core.optim import make_optimizer
from nev.train.core.rng import gather_rng, restore_rng
from nev.train.core.state_dict import gather_tensors, load_optimizer, optimizer_tensors, unknown_parameters
from nev.train.job import find_resume_point

CPU = torch.device("cpu")


def state(step: int, **metrics: float) -> CheckpointState:
    return CheckpointState(step, {"name": "x"}, {"plan": "p"}, metrics, world_size=1, bad_rows=0, history={})


def trained(steps: int = 2) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = make_optimizer(model, Optim(lr=0.1, weight_decay=0.1))
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(16, 4)).square().sum().backward()
    optimizer.step()


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_resumed_training_equals_undisturbed_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained()
    location = checkpoint.save(str(tmp_path), state(2), gather_tensors(model, optimizer), gather_rng(CPU, 1))
    for _ in range(3):
        step(model, optimizer)

    fresh = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    again = make_optimizer(fresh, Optim(lr=0.1, weight_decay=0.1))
    found, weights, moments, rng = load_checkpoint(location)
    fresh.load_state_dict(weights)
    load_optimizer(fresh, again, moments, 1)
    restore_rng(rng, 0, CPU, seed=0, step=found.step)
    for _ in range(3):
        step(fresh, again)

    assert found == state(2)
    assert equal(model.state_dict(), fresh.state_dict())


def test_another_world_size_draws_differently_on_each_rank() -> None:
    restore_rng({}, 0, CPU, seed=1, step=5)
    first = torch.rand(4)
    restore_rng({}, 1, CPU, seed=1, step=5)
    second = torch.rand(4)
    restore_rng({}, 0, CPU, seed=1, step=5)
    assert torch.equal(first, torch.rand(4))
    assert not torch.equal(first, second)


def test_a_gpu_without_a_saved_state_draws_differently_on_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of a CPU run, resumed on GPUs: the CPUs' generators go on, the GPUs' are seeded apart."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    saved = {f"{rank}/cpu": torch.Generator().manual_seed(rank).get_state() for rank in range(2)}
    torch.manual_seed(7)  # as the workers do before they draw the weights
    for rank in range(2):
        restore_rng(saved, rank, torch.device("cuda"), seed=1, step=5)
        assert torch.equal(torch.get_rng_state(), saved[f"{rank}/cpu"])
    assert len(set(seeds)) == 3, "rank 0, rank 1, and the weights"
    restored: list[Tensor] = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.append(state))
    restore_rng({**saved, "1/cuda": saved["0/cpu"]}, 1, torch.device("cuda"), seed=1, step=5)
    assert torch.equal(restored[0], saved["0/cpu"])


@pytest.mark.parametrize("name", ["step-00000500.bak", "step-00000500-copy", "step-500", "step-", "old"])
def test_only_step_and_digits_is_a_checkpoint(tmp_path: Path, name: str) -> None:
    model, optimizer = trained()
    run = str(tmp_path)
    for number in (1, 2, 3):
        saved = checkpoint.save(run, state(number), gather_tensors(model, optimizer), gather_rng(CPU, 1))
    shutil.copytree(saved, tmp_path / "checkpoints" / name)
    assert manifest.latest_checkpoint(run) == saved
    assert find_resume_point(run).step == 3
    assert manifest.list_steps(run) == [1, 2, 3]
    assert manifest.best_checkpoint(run, "top1") is None
    assert len(manifest.pending_validation(run, lambda step: step > 1)) == 2
    manifest.prune_checkpoints(run, keep_last=1, keep_best=None)
    manifest.remove_checkpoints_after(run, 0)
    assert manifest.list_steps(run) == []
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [name], "what nev did not write stays"


def test_a_checkpoint_in_the_folder_of_another_step_is_damaged(tmp_path: Path) -> None:
    model, optimizer = trained()
    saved = checkpoint.save(str(tmp_path), state(1), gather_tensors(model, optimizer), gather_rng(CPU, 1))
    shutil.copytree(saved, tmp_path / "checkpoints" / "step-00000009")
    found = manifest.latest_valid(str(tmp_path))
    assert found
    assert found.location == saved
    assert "step-00000009/state.json: damaged (it is the checkpoint of step 1)" in found.damaged[0]


def test_folder_without_manifest_is_not_a_checkpoint(tmp_path: Path) -> None:
    model, optimizer = trained()
    older = checkpoint.save(str(tmp_path), state(1), gather_tensors(model, optimizer), gather_rng(CPU, 1))
    newer = checkpoint.save(str(tmp_path), state(2), gather_tensors(model, optimizer), gather_rng(CPU, 1))
    assert manifest.latest_checkpoint(str(tmp_path)) == newer
    Path(newer, "state.json").unlink()  # as a process that died before its last write would leave it
    assert manifest.latest_checkpoint(str(tmp_path)) == older
    with pytest.raises(CheckpointError, match=r"not a checkpoint .*Found: .*step-00000001"):
        load_checkpoint(newer)
    with pytest.raises(CheckpointError, match=r"not a checkpoint .*Found: .*step-00000001"):
        load_checkpoint(str(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"there is no such folder\. Checkpoints lie in RUN/checkpoints/step-\.\.\."
    ):
        load_checkpoint(str(tmp_path / "nothing"))
    assert checkpoint.save(str(tmp_path), state(2), gather_tensors(model, optimizer), gather_rng(CPU, 1)) == newer
    assert manifest.latest_checkpoint(str(tmp_path)) == newer


@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.safetensors", "rng.safetensors"])
def test_damage_is_found_and_named(tmp_path: Path, part: str) -> None:
    model, optimizer = trained()
    location = checkpoint.save(str(tmp_path), state(1), gather_tensors(model, optimizer), gather_rng(CPU, 1))
    data = bytearray(Path(location, part).read_bytes())
    data[-1] ^= 1
    Path(location, part).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{part}.*damaged"):
        load_checkpoint(location)


def test_manifest_that_is_not_json_is_an_error(tmp_path: Path) -> None:
    model, optimizer = trained()
    location = checkpoint.save(str(tmp_path), state(1), gather_tensors(model, optimizer), gather_rng(CPU, 1))
    Path(location, "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(location)


def test_nothing_but_safetensors_and_json(tmp_path: Path) -> None:
    model, optimizer = trained()
    location = checkpoint.save(str(tmp_path), state(1), gather_tensors(model, optimizer), gather_rng(CPU, 1))
    assert sorted(path.name for path in Path(location).iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "rng.safetensors",
        "state.json",
    ]
    assert json.loads(Path(location, "state.json").read_text())["step"] == 1


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    model, optimizer = trained()
    for number, score in enumerate([0.1, 0.9, 0.2, 0.3, 0.4], 1):
        checkpoint.save(str(tmp_path), state(number, top1=score), gather_tensors(model, optimizer), gather_rng(CPU, 1))
    manifest.prune_checkpoints(str(tmp_path), keep_last=2, keep_best="top1")
    kept = [int(location.rsplit("-", 1)[1]) for location in manifest.list_checkpoints(str(tmp_path))]
    assert kept == [2, 4, 5]
    assert (manifest.best_checkpoint(str(tmp_path), "top1") or "").endswith("step-00000002")
    assert manifest.best_checkpoint(str(tmp_path), "absent") is None


def test_optimizer_state_of_another_model_is_refused() -> None:
    model, optimizer = trained()
    tensors = optimizer_tensors(model, optimizer)
    assert unknown_parameters(model, tensors) == []
    assert unknown_parameters(nn.Sequential(nn.Linear(4, 8)), tensors) == ["2.bias", "2.weight"]


def damage(location: str, part: str) -> None:
    data = bytearray(Path(location, part).read_bytes())
    data[len(data) // 2] ^= 1
    Path(location, part).write_bytes(data)


@pytest.mark.parametrize(
    "part", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "beside.bin", "gone"]
)
def test_the_one_before_a_damaged_checkpoint_is_used(tmp_path: Path, part: str) -> None:
    model, optimizer = trained()
    run = str(tmp_path)
    older, newer = (
        checkpoint.save(
            run, state(number), gather_tensors(model, optimizer), gather_rng(CPU, 1), {"beside.bin": b"vectors"}
        )
        for number in (1, 2)
    )
    if part == "state.json":
        Path(newer, part).write_text("{")
    elif part == "gone":
        Path(newer, "rng.safetensors").unlink()
    else:
        damage(newer, part)
    found = manifest.latest_valid(run)
    assert found
    assert found.location == older
    assert len(found.damaged) == 1
    assert newer in found.damaged[0]
    assert find_resume_point(run).step == 1
    damage(older, "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole:\n  .*00000002.*\n  .*00000001/model"):
        find_resume_point(run)


def test_a_run_without_a_checkpoint_begins(tmp_path: Path) -> None:
    assert manifest.latest_valid(str(tmp_path)) is None
    assert find_resume_point(str(tmp_path)).step == 0


def test_damaged_checkpoints_beyond_a_new_one_do_not_push_whole_ones_out(tmp_path: Path) -> None:
    model, optimizer = trained()
    run = str(tmp_path)

    def save(step: int) -> str:
        return checkpoint.save(run, state(step, top1=step / 10), gather_tensors(model, optimizer), gather_rng(CPU, 1))

    save(1)
    damage(save(4), "model.safetensors")
    Path(save(3), "state.json").write_text("{")
    manifest.remove_checkpoints_after(run, 1)  # the run continues from step 1
    newest = save(2)
    manifest.prune_checkpoints(run, keep_last=1, keep_best="top1")
    assert manifest.list_checkpoints(run) == [newest]
