"""A checkpoint is hashed once and read once, by rank 0; every rank gets the same weights, moments and errors."""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.checkpoints import load_checkpoint
from helpers.gloo import on_ranks
from helpers.training import prepare_job, run_bare, train_reader
from rich.console import Console

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.paths import with_absolute_paths
from nev.data import stream
from nev.models.precision import choose_precision
from nev.models.text import TextTower
from nev.runs import checkpoint, manifest
from nev.runs.manifest import Damaged
from nev.storage.files import filesystem
from nev.train import experiment
from nev.train.core.parallel import is_sharded
from nev.train.core.state_dict import gather_tensors
from nev.train.driver.launcher import make_streams
from nev.train.driver.preflight import Prepared, prepare
from nev.train.job import Job, find_resume_point
from nev.train.worker import state
from nev.train.worker.state import RankContext, load_model, make_train_state

Make = Callable[..., Experiment]
CPU = torch.device("cpu")
WORLD, STEP = 2, 4


def stopped(tiny: Make, text: TextTower, **options: Any) -> Job:
    """The job of a run that has a checkpoint of step 4 and continues to step 8."""
    config = with_absolute_paths(
        tiny(train__steps=8, train__checkpoint_every=2, data__val=None, eval={}, workers__count=WORLD, **options)
    )
    run_bare(prepare_job(config, text, stop_after=STEP), train_reader(config, text))
    return prepare_job(config, text)


def make_context(rank: int, world: int = WORLD) -> RankContext:
    return RankContext(rank, world, CPU, choose_precision("fp32", CPU))


def _loads(rank: int, job: Job) -> dict[str, Any]:
    reads: list[str] = []
    fs_type, ctx = type(filesystem(job.run)[0]), make_context(rank)
    cat_file = fs_type.cat_file

    def counted(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        reads.append(Path(path).name)
        return cat_file(self, path, *args, **kwargs)

    fs_type.cat_file = counted
    train_state, start = make_train_state(load_model(job, ctx, STEP), job, ctx)
    moments = [slot for slots in train_state.optimizer.state.values() for slot in slots.values()]
    return {
        "reads": sorted(name for name in reads if name.endswith(".safetensors")),
        "step": start.step,
        "history": start.history["losses"],
        "sharded": sum(map(is_sharded, moments)) / len(moments),
        "rng": torch.get_rng_state(),
        **gather_tensors(train_state.model, train_state.optimizer)._asdict(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_rank_0_reads_and_every_rank_has_what_one_process_loads(
    fsdp: bool, tiny: Make, text: TextTower, tmp_path: Path
) -> None:
    job = stopped(tiny, text, train__fsdp=fsdp)
    _, weights, moments, rng = load_checkpoint(f"{job.run}/checkpoints/step-{STEP:08d}")
    ranks = on_ranks(functools.partial(_loads, job=job), WORLD, tmp_path)
    assert [rank["reads"] for rank in ranks] == [
        ["model.safetensors", "optimizer.safetensors", "rng.safetensors"],
        [],
    ]
    for rank in ranks:
        assert (rank["step"], rank["history"]) == (STEP, STEP)
        assert rank["sharded"] == pytest.approx(2 / 3, abs=0.05) if fsdp else rank["sharded"] == 0
        for loaded, expected in ((rank["model"], weights), (rank["optimizer"], moments)):
            assert loaded.keys() == expected.keys()
            assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert torch.equal(ranks[0]["rng"], rng["0/cpu"])
    assert not torch.equal(ranks[1]["rng"], rng["0/cpu"]), "a rank without a state draws otherwise"


def _fails(rank: int, job: Job) -> list[list[str]]:
    """The error of each of four starts: two with a damaged checkpoint, two with a rank that cannot build the model."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise ConfigError("this node has another encoder")

    errors, build = [], state.build_model
    for step, unbuilt in ((2, None), (STEP, None), (0, 1), (0, 0)):
        state.build_model = refuse if rank == unbuilt else build
        try:
            load_model(job, make_context(rank), step)
        except (Damaged, ConfigError) as error:
            errors.append([type(error).__name__, str(error).removeprefix(f"{job.run}/checkpoints/")])
    return errors


@pytest.mark.slow
def test_an_error_of_one_rank_is_raised_on_all(tiny: Make, text: TextTower, tmp_path: Path) -> None:
    """Damage that came after the verification, and a node that differs from the driver's."""
    job = stopped(tiny, text)
    for file in ("step-00000002/optimizer.safetensors", f"step-{STEP:08d}/model.safetensors"):
        Path(job.run, "checkpoints", file).write_bytes(b"cut")
    first, second = on_ranks(functools.partial(_fails, job=job), WORLD, tmp_path)
    assert first == second
    assert [kind for kind, _ in first] == ["Damaged", "Damaged", "ConfigError", "ConfigError"]
    assert first[0][1].startswith("step-00000002/optimizer.safetensors: damaged (")
    assert first[1][1].startswith("step-00000004/model.safetensors: damaged (")
    assert first[2][1] == first[3][1] == "this node has another encoder"


class HashedBytes:
    """Counts the bytes of checkpoints that are hashed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        digest, sha256 = hashlib.file_digest, hashlib.sha256

        def file_digest(file: Any, kind: str) -> Any:
            self.count += file.size
            return digest(file, kind)

        def hashed(data: bytes = b"") -> Any:
            self.count += len(data)
            return sha256(data)

        monkeypatch.setattr(manifest, "hashlib", SimpleNamespace(file_digest=file_digest))
        monkeypatch.setattr(checkpoint, "hashlib", SimpleNamespace(sha256=hashed))


@pytest.mark.slow
def test_a_start_hashes_every_byte_of_the_checkpoint_once(
    tiny: Make, text: TextTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's checks, the stream and the load of rank 0; after a fault the newest valid checkpoint is looked for."""
    job = stopped(tiny, text)
    folder = Path(job.run, "checkpoints", f"step-{STEP:08d}")
    size = sum(file.stat().st_size for file in folder.iterdir() if file.suffix == ".safetensors")
    streams: list[tuple[int, int, str]] = []
    posted: list[int] = []
    monkeypatch.setattr(stream, "make_streams", lambda reader, plan, *others: [streams.append(others[:3])])
    monkeypatch.setattr("ray.get", lambda answer: answer)
    mailbox = SimpleNamespace(set_start_step=SimpleNamespace(remote=posted.append))

    hashed = HashedBytes(monkeypatch)
    prepared = prepare(job.config)
    (make_next_stream,) = make_streams(job, prepared.reader, mailbox, prepared.resume.step).values()
    make_next_stream()
    loaded = load_model(job, make_context(0, world=1), posted[-1])
    assert loaded.state
    assert loaded.state.step == STEP
    assert hashed.count == size

    Path(folder, "rng.safetensors").write_bytes(b"cut")
    make_next_stream()
    assert (streams, posted) == ([(4, 8, "tiny"), (2, 8, "tiny")], [4, 2])
    assert find_resume_point(job.run).step == 2

    shutil.rmtree(folder)
    with pytest.raises(Damaged, match="removed after it was verified"):
        load_model(job, make_context(0, world=1), STEP)


class Reached(Exception):
    """Training would begin."""


@pytest.mark.slow
def test_checkpoints_that_another_driver_changed_are_verified_again(
    tiny: Make, text: TextTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the mailbox is open, another driver of this run may write and remove checkpoints."""
    job = stopped(tiny, text)

    @contextmanager
    def open_late(run: str) -> Iterator[None]:
        shutil.rmtree(Path(run, "checkpoints", f"step-{STEP:08d}"))
        yield

    def train(prepared: Prepared, *_: object) -> None:
        raise Reached(prepared.resume.step)

    monkeypatch.setattr(experiment, "open_mailbox", open_late)
    monkeypatch.setattr(experiment, "train_and_validate", train)
    monkeypatch.setattr(experiment, "connecting", nullcontext)
    for name in ("connect", "check_object_store"):
        monkeypatch.setattr(experiment, name, lambda *_: None)
    with pytest.raises(Reached) as reached:
        experiment.run_experiment(job.config, Console(quiet=True))
    assert reached.value.args == (2,)
