"""Initialisations made at home: what they learn, and that a run takes them up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.pictures import rows_of, write_shard
from rich.console import Console
from safetensors.torch import load_file
from torch.nn import functional

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.data.block import Block
from nev.models.vision import build_vision
from nev.runs.tracking import Tracker, make_client
from nev.storage.reading import DataError
from nev.train.pretrain import MASKED, Inpainter, pretrain, train_objective

Make = Callable[..., Experiment]
SIZE, PATCH = 32, 8


def inpainter(config: Experiment) -> Inpainter:
    torch.manual_seed(0)
    return Inpainter(build_vision(config.vision.model_copy(update={"pool": "mean"}), SIZE, 1), SIZE)


def test_only_masked_patches_count_and_they_are_hidden(tiny: Make) -> None:
    model = inpainter(tiny()).eval()
    images = torch.randn(3, 3, SIZE, SIZE)
    whole = model.errors(images, torch.Generator().manual_seed(1))
    masked = model._masked
    assert masked is not None
    assert masked.sum(1).tolist() == [round(MASKED * 16)] * 3

    patches = functional.unfold(images, PATCH, stride=PATCH)  # what is masked cannot be seen: only the target changes
    changed = patches + 100 * masked[:, None]
    other = functional.fold(changed, SIZE, PATCH, stride=PATCH)
    tokens: list[torch.Tensor] = []
    model.trunk.norm.register_forward_hook(lambda module, given, out: tokens.append(out.detach()))
    model.errors(images, torch.Generator().manual_seed(1))
    model.errors(other, torch.Generator().manual_seed(1))
    assert torch.equal(*tokens)
    by_hand = (model.pixels(tokens[0][:, 1:]) - patches.transpose(1, 2)).abs().mean(2)
    torch.testing.assert_close(whole, (by_hand * masked).sum(1) / masked.sum(1))


def test_what_has_no_patches_or_labels_is_refused(tiny: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no patches to mask"):
        inpainter(tiny(vision={"trunk": "convnext_atto"}))
    rows = [{name: value for name, value in row.items() if name != "label"} for row in rows_of(64)]
    write_shard(tmp_path / "set" / "a.parquet", rows, [64])
    with pytest.raises(DataError, match="needs an integer label column"):
        pretrain(tiny(data__train=str(tmp_path / "set")), "supervised", Console(quiet=True))
    for row in rows:
        row["label"] = 0
    kinds = pa.schema({"uid": pa.string(), "image": pa.binary(), "caption": pa.string(), "label": pa.int64()})
    write_shard(tmp_path / "one" / "a.parquet", rows, [64], kinds)
    with pytest.raises(DataError, match="its labels name fewer than two classes"):
        pretrain(tiny(data__train=str(tmp_path / "one")), "supervised", Console(quiet=True))


def make_blocks(rows: int) -> Iterator[Block]:
    random = np.random.default_rng(0)
    while True:
        image = random.integers(0, 256, (rows, SIZE, SIZE, 3), np.uint8)
        yield {"image": image, "valid": np.ones(rows, bool), "label": np.arange(rows)}


def test_a_step_runs_in_the_precision_of_the_config_and_is_clipped(tiny: Make) -> None:
    config = tiny(train__precision="bf16", train__log_every=1, optim__clip_norm=1e-3, train__global_batch=32)
    model = inpainter(config)
    kinds: set[torch.dtype] = set()
    model.trunk.blocks[0].attn.qkv.register_forward_hook(lambda module, given, out: kinds.add(out.dtype))
    logged: list[float] = []
    quiet, cpu = Console(quiet=True), torch.device("cpu")
    train_objective(
        config, model, make_blocks(32), 2, cpu, lambda step, metrics: logged.extend(metrics.values()), quiet
    )
    assert kinds == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    norm = torch.nn.utils.get_total_norm([one.grad for one in model.parameters() if one.grad is not None])
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)
    assert len(logged) == 2


def test_a_step_without_a_finite_loss_changes_nothing(tiny: Make) -> None:
    config = tiny(train__global_batch=32)
    model = inpainter(config)
    model.pixels.register_forward_hook(lambda module, given, out: out * torch.nan)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"the loss of step 1 is nan, of 32 usable pictures: lower optim\.lr"):
        train_objective(config, model, make_blocks(32), 1, torch.device("cpu"), lambda *_: None, Console(quiet=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.ray
@pytest.mark.slow
def test_a_trunk_learns_and_a_run_takes_it_up(ray_cluster: None, tiny: Make, pictures: Path) -> None:
    config = tiny(name="init", train__steps=60, optim__lr=2e-3)
    named = pretrain(config, "supervised", Console(quiet=True))
    filled = pretrain(config, "mim", Console(quiet=True))
    assert named.metrics["pretrain/top1"] > 2 / len((pictures / "classes.txt").read_text().splitlines())
    uri = f"sqlite:///{config.output}/mlflow.db"
    runs = make_client(uri).search_runs(["1"], "tags.`nev.kind` = 'pretrain'")
    assert {run.info.run_name: run.info.status for run in runs} == {
        "init-supervised": "FINISHED",
        "init-mim": "FINISHED",
    }
    (run,) = (run for run in runs if run.info.run_name == "init-mim")
    losses = Tracker(uri, run.info.run_id).history("pretrain/loss")[1]
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:3])
    assert filled.metrics["pretrain/mim_error"] < losses[0]

    for made in (named, filled):
        settings = config.vision.model_copy(update={"weights": made.weights})
        tower = build_vision(settings, SIZE, 384)
        state = load_file(made.weights)
        assert all(torch.equal(tower.trunk.state_dict()[name], tensor) for name, tensor in state.items())
    assert not torch.equal(*(load_file(made.weights)["blocks.0.attn.qkv.weight"] for made in (named, filled)))
    again = pretrain(config, "mim", Console(quiet=True))
    assert again.metrics == filled.metrics, "the same seed, the same weights"
