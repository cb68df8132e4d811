"""FSDP2 on two processes: the step, the checkpoint and the validation of one process, and half of its memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.gloo import on_ranks
from helpers.steps import CPU, FP32, ROWS, SIZE, WIDTH, batch, poisoned, share_of, steps
from helpers.training import prepare_job
from rich.console import Console
from torch import Tensor

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.file import parse
from nev.config.model import Vision
from nev.embed.embedder import Embedder
from nev.eval.validation.on_cluster import embed
from nev.eval.validation.scoring import score_validation
from nev.eval.validation.task import make_validation
from nev.models.dual_encoder import DualEncoder
from nev.models.text import load_text
from nev.models.vision import build_vision
from nev.runs import checkpoint
from nev.runs.manifest import CheckpointState, read_manifest
from nev.runs.tracking import Tracker
from nev.train.core.optim import make_optimizer
from nev.train.core.parallel import distribute, full_tensor, is_sharded, transformer_blocks
from nev.train.core.state_dict import Tensors, gather_tensors, load_optimizer, unknown_parameters
from nev.train.core.step import Batch, train_step
from nev.train.core.vision_setup import apply_train_options
from nev.train.experiment import run_experiment
from nev.train.worker.state import build_model

Make = Callable[..., Experiment]
WORLD, STEPS = 2, 3
TRUNK = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # float32, sums in another order


def experiment(kind: str = "softmax", **train: Any) -> Experiment:
    return parse(
        Experiment,
        {
            "name": "shards",
            "data": {"train": "nowhere", "image_size": SIZE, "block_rows": 4},
            "vision": {"trunk": "vit_tiny_patch16_224", "trunk_args": TRUNK, "pool": "map"},
            "loss": {"kind": kind, "init_scale": 10.0},
            # eps: without it the first update is the gradient's sign, and rounding decides where it is nearly 0.
            "optim": {"lr": 0.01, "eps": 1e-3, "clip_norm": 0.05, "weight_decay": 0.1},
            "train": {"global_batch": ROWS, "steps": STEPS, "fsdp": True, **train},
        },
    )


def made(config: Experiment) -> DualEncoder:
    torch.manual_seed(1)
    vision = build_vision(config.vision, SIZE, WIDTH)
    apply_train_options(vision, config.train, backend="aot_eager")
    return DualEncoder(vision, config.loss, bias=config.initial_bias).train()


def share(rank: int) -> Batch:
    return share_of(batch(torch.float32), rank, WORLD)


def alone(config: Experiment) -> tuple[Tensor, Tensors]:
    model = made(config)
    optimizer = make_optimizer(model, config.optim)
    return steps(model, optimizer, config, batch(torch.float32), STEPS), gather_tensors(model, optimizer)


def _trains(rank: int, config: Experiment) -> dict[str, Any]:
    model = made(config)
    wrapped = distribute(model, True, WORLD, CPU)
    optimizer = make_optimizer(model, config.optim)
    found = steps(wrapped, optimizer, config, share(rank), STEPS)
    held = [*model.parameters(), *(slot for slots in optimizer.state.values() for slot in slots.values())]
    mine = sum(one.to_local().numel() for one in held if is_sharded(one))
    tensors = gather_tensors(model, optimizer)
    return {
        "found": found,
        "mine": mine,
        "all": sum(one.numel() for one in held if is_sharded(one)),
        **tensors._asdict(),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "train"),
    [
        ("softmax", {}),
        ("sigmoid", {"micro_batch": 4}),
        ("softmax", {"micro_batch": 6, "activation_checkpointing": True}),
        ("softmax", {"compile": True}),
    ],
)
def test_steps_are_those_of_one_process(kind: str, train: dict[str, Any], tmp_path: Path) -> None:
    config = experiment(kind, **train)
    results, expected = alone(experiment(kind))
    ranks = on_ranks(functools.partial(_trains, config=config), WORLD, tmp_path)
    for rank in ranks:
        torch.testing.assert_close(rank["found"], results, **CLOSE)
        for held in ("model", "optimizer"):
            assert rank[held].keys() == getattr(expected, held).keys()
            for name, tensor in getattr(expected, held).items():
                torch.testing.assert_close(
                    rank[held][name], tensor, **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
                )
        assert rank["mine"] < 0.6 * rank["all"], "uneven rows aside, each rank holds its half"
    assert (results[:, 3] > config.optim.clip_norm).all(), "the gradients were clipped"


def _goes_on(rank: int, folder: str, fsdp: bool) -> dict[str, Any]:
    config = experiment()
    model = made(config)
    wrapped = distribute(model, True, WORLD, CPU)
    optimizer = make_optimizer(model, config.optim)
    steps(wrapped, optimizer, config, share(rank), 1)
    tensors = gather_tensors(model, optimizer, keep=rank == 0)
    if rank == 0:
        checkpoint.save(folder, CheckpointState(1, {}, {}, {}, WORLD, 0, {}), tensors, {})
    straight = steps(wrapped, optimizer, config, share(rank), 2)
    dist.barrier()

    again = made(config.model_copy(update={"seed": 5}))
    location = f"{folder}/checkpoints/step-00000001"
    again.load_state_dict(checkpoint.load_model(location)[1])
    moments = checkpoint.load_training_state(location)[0] if rank == 0 else {}
    assert not unknown_parameters(again, moments)
    wrapped_again = distribute(again, fsdp, WORLD, CPU)
    optimizer_again = make_optimizer(again, config.optim)
    load_optimizer(again, optimizer_again, moments, WORLD)
    resumed = steps(wrapped_again, optimizer_again, config, share(rank), 2)
    pairs = [
        (full_tensor(a).detach(), full_tensor(b).detach())
        for a, b in zip(model.parameters(), again.parameters(), strict=True)
    ]
    return {
        "nothing": not (rank == 0 or tensors.model or tensors.optimizer),
        "pairs": pairs,
        "straight": straight,
        "resumed": resumed,
    }


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [True, False])
def test_a_checkpoint_is_whole_and_goes_on_bit_for_bit_or_under_ddp(fsdp: bool, tmp_path: Path) -> None:
    folder, exact = str(tmp_path / "run"), {"rtol": 0, "atol": 0}
    first, second = on_ranks(functools.partial(_goes_on, folder=folder, fsdp=fsdp), WORLD, tmp_path)
    assert second["nothing"], "no other rank holds a whole copy"
    for rank in (first, second):
        for straight, resumed in [*rank["pairs"], (rank["straight"], rank["resumed"])]:
            torch.testing.assert_close(resumed, straight, **(exact if fsdp else CLOSE))
    _, weights = checkpoint.load_model(f"{folder}/checkpoints/step-00000001")
    made(experiment()).load_state_dict(weights)  # one process can take it up


def _meets_nan(rank: int) -> bool:
    config = experiment()
    model = made(config)
    wrapped = distribute(model, True, WORLD, CPU)
    optimizer = make_optimizer(model, config.optim)
    before = [full_tensor(parameter).detach().clone() for parameter in model.parameters()]
    given = share(rank)
    train_step(wrapped, optimizer, poisoned(given) if rank else given, config, FP32)
    return all(torch.equal(full_tensor(now), was) for now, was in zip(model.parameters(), before, strict=True))


@pytest.mark.slow
def test_a_step_that_one_rank_spoils_changes_nothing_on_any(tmp_path: Path) -> None:
    assert on_ranks(_meets_nan, WORLD, tmp_path) == [True, True]


def test_every_block_of_a_trunk_is_gathered_apart() -> None:
    vit = build_vision(experiment().vision, SIZE, WIDTH)
    assert [type(one).__name__ for one in transformer_blocks(vit)] == ["Block"] * 3
    convnext = build_vision(Vision(trunk="convnext_atto", pool="mean"), 64, WIDTH)
    names = [type(one).__name__ for one in transformer_blocks(convnext)]
    assert names.count("ConvNeXtBlock") == 12
    assert names.count("ConvNeXtStage") == 4
    assert names.index("ConvNeXtBlock") > names.index("ConvNeXtStage"), "outer ones first"


def test_batch_norm_is_refused(tiny: Make) -> None:
    trunk = {"vision__trunk": "resnet10t", "vision__trunk_args": {}, "vision__pool": "mean"}
    config = tiny(train__fsdp=True, eval={}, data__val=None, **trunk)
    with pytest.raises(ConfigError, match=r"train\.fsdp: vision\.trunk\.\S+ is a batch norm"):
        build_model(prepare_job(config, load_text(config.text)), replaced=False)


def test_a_process_alone_splits_nothing() -> None:
    model = made(experiment())
    assert distribute(model, True, 1, CPU) is model
    assert not any(map(is_sharded, model.parameters()))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_on_ray_of_both_towers_validates_in_lockstep(
    ray_cluster: None, tiny: Make, small_text: dict[str, object]
) -> None:
    """Two ranks validate three blocks; one process computes the same metrics from the checkpoint."""
    options = {"lock": "none", "train__steps": 4, "train__eval_every": 2, "train__micro_batch": 16, "eval__batch": 48}
    config = tiny(name="fsdp", train__fsdp=True, workers__count=2, **options, **small_text)
    summary = run_experiment(config, Console(quiet=True))
    steps, losses = Tracker(summary.tracking_uri, summary.mlflow_run_id).history("loss")
    assert steps == [1, 2, 3, 4]
    assert losses[-1] < losses[0]
    embedder = Embedder.from_checkpoint(summary.checkpoint)
    task = make_validation(embedder.config, embedder.base_text)
    again = score_validation(task, *embed(task, embedder), embedder.logit_scale)
    trained = read_manifest(summary.checkpoint)["metrics"]
    assert trained.keys() == again.keys() | {"space/text_drift"}
    for name in again.keys() - {"zero_shot/scale_fitted"}:  # which is known to 1e-3 of itself
        assert again[name] == pytest.approx(trained[name], abs=0.02), name
