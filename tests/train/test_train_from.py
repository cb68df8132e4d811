"""`train.from`: a new run begins from the model of a checkpoint, and from nothing else of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gloo import on_ranks
from helpers.training import CPU, load_train_state, prepare_job, run_bare, train_reader, weights
from torch import Tensor

from nev.common.errors import NevError
from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.file import load, to_yaml
from nev.config.paths import with_absolute_paths
from nev.models.precision import choose_precision
from nev.models.text import TextTower, load_text
from nev.runs.manifest import read_manifest
from nev.train.driver.preflight import check_inputs
from nev.train.driver.setup import describe_run
from nev.train.job import Job
from nev.train.worker.state import RankContext

Make = Callable[..., Experiment]
QUIET = {"data__val": None, "eval": {}, "train__checkpoint_every": 2}


@pytest.fixture
def source(tiny: Make, text: TextTower) -> str:
    """The run of two steps that others begin from."""
    return train(tiny(**QUIET, train__steps=2, name="source"), text)


def train(config: Experiment, text: TextTower) -> str:
    config = with_absolute_paths(config)
    job = prepare_job(config, text)
    run_bare(job, train_reader(config, text))
    return job.run


def context(rank: int = 0, world: int = 1) -> RankContext:
    return RankContext(rank, world, CPU, choose_precision("fp32", CPU))


def first_weights(config: Experiment, text: TextTower) -> dict[str, Tensor]:
    state, start = load_train_state(prepare_job(with_absolute_paths(config), text), context())
    assert start.step == 0
    assert not state.optimizer.state, "the moments are new"
    return state.model.state_dict()


@pytest.mark.parametrize("place", ["", "/checkpoints/step-00000002"], ids=["run", "checkpoint"])
def test_a_new_run_has_the_weights_alone(tiny: Make, text: TextTower, source: str, place: str) -> None:
    config = tiny(**QUIET, train__from=source + place, train__global_batch=128, optim__lr=2e-3, train__steps=3)
    begun, saved = first_weights(config, text), weights(source, 2)
    assert begun.keys() == saved.keys()
    assert all(torch.equal(begun[name], saved[name]) for name in saved)
    job = prepare_job(with_absolute_paths(config), text)
    assert describe_run(job, 0, 2**20).endswith(f", from the weights of {source}/checkpoints/step-00000002")
    assert (
        job.fingerprints["start"] == read_manifest(f"{source}/checkpoints/step-00000002")["sha256"]["model.safetensors"]
    )


def test_a_run_that_continues_does_not_need_its_start(tiny: Make, text: TextTower, source: str) -> None:
    config = with_absolute_paths(tiny(**QUIET, train__from=source, train__steps=4))
    run_bare(prepare_job(config, text, stop_after=2), train_reader(config, text))
    Path(source).rename(f"{source}.gone")
    job = prepare_job(config, text)
    run_bare(job, train_reader(config, text))
    ends = [read_manifest(f"{job.run}/checkpoints/step-{step:08d}")["fingerprints"]["start"] for step in (2, 4)]
    assert ends[0] == ends[1]


def test_the_vision_section_need_not_be_changed(tiny: Make, text: TextTower, source: str) -> None:
    config = tiny(**QUIET, train__from=source, vision__weights="nowhere.safetensors")
    assert torch.equal(
        first_weights(config, text)["vision.trunk.cls_token"], weights(source, 2)["vision.trunk.cls_token"]
    )


def test_another_loss_keeps_the_towers_and_the_scale(tiny: Make, text: TextTower, source: str) -> None:
    begun = first_weights(tiny(**QUIET, train__from=source, loss={"kind": "sigmoid", "init_bias": -3.0}), text)
    assert begun["bias"] == -3.0
    assert torch.equal(begun["log_scale"], weights(source, 2)["log_scale"])
    sigmoid = train(tiny(**QUIET, name="sigmoid", loss={"kind": "sigmoid"}, train__steps=2), text)
    assert "bias" not in first_weights(tiny(**QUIET, train__from=sigmoid), text)


def test_a_text_tower_that_was_locked_is_trained_now(tiny: Make, small_text: dict[str, object]) -> None:
    base = tiny(**QUIET, **small_text, train__steps=2, name="locked")
    text = load_text(base.text)
    run = train(base, text)
    both = tiny(**QUIET, **small_text, lock="none", train__from=run, train__steps=2, name="both")
    begun = first_weights(both, text)
    assert torch.equal(begun["vision.trunk.cls_token"], weights(run, 2)["vision.trunk.cls_token"])
    assert any(name.startswith("text.") for name in begun)
    trained = train(both, text)
    with pytest.raises(ConfigError, match=r"was trained with lock: none.*give lock=none"):
        check_inputs(with_absolute_paths(tiny(**QUIET, **small_text, train__from=trained)), text)
    locked_image = tiny(**QUIET, **small_text, lock="image", train__from=trained)
    assert torch.equal(first_weights(locked_image, text)["log_scale"], weights(trained, 2)["log_scale"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vision__trunk_args__depth": 3},
            r"another vision tower.*missing there: trunk|missing there: vision\.trunk\.blocks\.2",
        ),
        ({"data__image_size": 64}, r"of another shape: vision\.trunk\.pos_embed \(1, 17, 64\) for \(1, 65, 64\)"),
        ({"vision__pool": "map"}, r"not in this model: vision\.pool"),
        ({"train__from": "{source}/checkpoints/step-00000009"}, r"step-00000009: there is no such folder"),
        ({"train__from": "{source}/nothing"}, r"nothing: there is no such folder"),
    ],
)
def test_another_model_is_refused_before_the_start(
    tiny: Make, text: TextTower, source: str, changes: dict[str, Any], message: str
) -> None:
    given = {"train__from": source, **changes}
    given["train__from"] = given["train__from"].format(source=source)
    with pytest.raises(NevError, match=message):
        check_inputs(with_absolute_paths(tiny(**QUIET, **given)), text)


def test_another_text_encoder_is_refused(tiny: Make, small_text: dict[str, object], source: str) -> None:
    config = with_absolute_paths(tiny(**QUIET, **small_text, train__from=source))
    with pytest.raises(ConfigError, match=r"trained towards another text encoder.*vision\.weights="):
        check_inputs(config, load_text(config.text))


def test_a_locked_trunk_and_a_trained_trunk_do_not_mix(tiny: Make, text: TextTower, source: str) -> None:
    locked = {
        "vision__lock": "trunk",
        "vision__mode": "online",
        "vision__pool": "mean",
        "vision__weights": f"{source}/checkpoints/step-00000002",
    }
    config = tiny(**QUIET, train__from=source, **locked)
    with pytest.raises(NevError, match=r"was trained with its trunk, and this run trains behind the locked trunk"):
        check_inputs(with_absolute_paths(config), text)


def _digest(rank: int, job: Job) -> float:
    state, _ = load_train_state(job, context(rank, 2))
    return float(sum(tensor.double().sum() for tensor in state.model.state_dict().values()))


def test_every_rank_begins_from_the_same_weights(tiny: Make, text: TextTower, source: str, tmp_path: Path) -> None:
    job = prepare_job(with_absolute_paths(tiny(**QUIET, train__from=source, workers__count=2)), text)
    wanted = float(sum(tensor.double().sum() for tensor in weights(source, 2).values()))
    first, second = on_ranks(partial(_digest, job=job), 2, tmp_path)
    assert first == second == pytest.approx(wanted, rel=1e-12)


def test_the_key_is_from_in_files_and_messages(tiny: Make, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(tiny(train__from="runs/a")))
    assert "  from: runs/a\n" in file.read_text()
    assert load(file).train.from_ == "runs/a"
    with pytest.raises(ConfigError, match=r"train\.form: unknown key; did you mean from\?"):
        load(file, ["train.form=runs/a"])
    with pytest.raises(ConfigError, match=r"gs://"):
        load(file, ["train.from=gs://bucket/run"])
