"""A run with more steps than before continues exactly where both schedules agree; everything else is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from helpers.s3_server import Proxy
from helpers.training import prepare_job, run_bare, train_reader, weights
from mlflow import MlflowClient
from rich.console import Console

from nev.config.experiment import Experiment
from nev.config.paths import with_absolute_paths
from nev.models.text import TextTower
from nev.runs.earlier_ends import earlier_end, set_end_aside
from nev.runs.manifest import CheckpointError, checkpoint_location, latest_checkpoint, list_steps, verify
from nev.runs.metrics_log import make_point, read_points, save_mlflow_run_id, write_points, write_validation
from nev.runs.tracking import open_run, tracking_uri
from nev.storage.files import list_files, write_atomic
from nev.train.driver.preflight import check_inputs
from nev.train.experiment import run_experiment

Make = Callable[..., Experiment]
WSD = {"optim__schedule": "wsd", "optim__warmup_steps": 2, "train__checkpoint_every": 3, "train__keep_last": 1}
QUIET = {"data__val": None, "eval": {}}


def train_steps(config: Experiment, text: TextTower) -> None:
    run_bare(prepare_job(config, text), train_reader(config, text))


def prolong(config: Experiment, text: TextTower) -> int | None:
    """Set the former end of a run aside, as a start of the longer run does. Returns the step that the run continues from."""
    inputs = check_inputs(config, text)
    assert inputs.checkpoint
    step = int(inputs.checkpoint.manifest["step"])
    if inputs.former_steps is not None:
        set_end_aside(f"{config.output}/{config.name}", inputs.former_steps, step)
    return step


@pytest.mark.parametrize("stop_after", [None, 9], ids=["finished", "in the middle of the decay"])
def test_a_prolonged_run_is_the_longer_run_bit_for_bit(tiny: Make, text: TextTower, stop_after: int | None) -> None:
    make = lambda **changes: with_absolute_paths(tiny(**WSD, **QUIET, optim__decay_steps=3, **changes))  # noqa: E731
    config = make(train__steps=10)
    run_bare(prepare_job(config, text, stop_after), train_reader(config, text))
    run, last = f"{config.output}/tiny", stop_after or 10
    assert list_steps(run) == [7, last], "the beginning of the decay is kept beside the newest"

    longer = make(train__steps=16)
    assert prolong(longer, text) == 7
    train_steps(longer, text)
    assert list_steps(run) == [13, 16]
    assert prolong(longer, text) == 16
    end = latest_checkpoint(earlier_end(run, 10))
    assert end
    assert verify(end)["step"] == last

    undisturbed = make(train__steps=16, name="undisturbed")
    train_steps(undisturbed, text)
    here, there = weights(run, 16), weights(f"{config.output}/undisturbed", 16)
    assert all(torch.equal(here[name], there[name]) for name in there)
    points = [
        {p.step: p.metrics["loss"] for p in read_points(f"{config.output}/{name}", 16) if "loss" in p.metrics}
        for name in ("tiny", "undisturbed")
    ]
    assert points[0] == points[1]
    assert len(points[0]) == 16


def test_a_constant_rate_goes_on_and_may_end_in_a_decay(tiny: Make, text: TextTower) -> None:
    make = lambda **changes: with_absolute_paths(tiny(**QUIET, **changes))  # noqa: E731
    config = make(train__steps=4, optim__schedule="constant")
    train_steps(config, text)
    ended = make(train__steps=8, optim__schedule="wsd", optim__decay_steps=3)
    assert prolong(ended, text) == 4
    assert not Path(f"{config.output}/tiny/ends").exists(), "no step is repeated"
    train_steps(ended, text)
    undisturbed = make(train__steps=8, optim__schedule="wsd", optim__decay_steps=3, name="undisturbed")
    train_steps(undisturbed, text)
    here, there = weights(f"{config.output}/tiny", 8), weights(f"{config.output}/undisturbed", 8)
    assert all(torch.equal(here[name], there[name]) for name in there)


def test_what_cannot_continue_is_refused_with_the_ways_out(tiny: Make, text: TextTower) -> None:
    make = lambda **changes: with_absolute_paths(tiny(**QUIET, train__keep_last=1, **changes))  # noqa: E731
    config = make(train__steps=10)
    train_steps(config, text)
    with pytest.raises(CheckpointError) as caught:
        check_inputs(make(train__steps=12, train__global_batch=128, optim__lr=2e-3), text)
    message = str(caught.value)
    for part in (
        "train.global_batch: 64 there, 128 here",
        "train.steps: 10 there, 12 here",
        "optim.lr: 0.001 there, 0.002 here",
        f"train.from={config.output}/tiny/checkpoints/step-00000010",
        "optim.schedule: constant or wsd",
        "name=",
    ):
        assert part in message
    with pytest.raises(CheckpointError, match=r"train\.steps: 10 there, 12 here"):
        check_inputs(make(train__steps=12), text)  # the cosine of 10 steps had other rates
    wsd = make(name="wsd", optim__schedule="wsd", train__steps=10)
    train_steps(wsd, text)
    with pytest.raises(CheckpointError, match=r"train\.steps: 10 there, 9 here"):
        check_inputs(
            make(name="wsd", optim__schedule="wsd", train__steps=9), text
        )  # shorter: nothing is thrown away for that


def test_a_damaged_end_is_set_aside_with_its_metrics(tiny: Make, text: TextTower) -> None:
    make = lambda **changes: with_absolute_paths(tiny(**WSD, **QUIET, optim__decay_steps=3, **changes))  # noqa: E731
    config = make(train__steps=10)
    train_steps(config, text)
    run = f"{config.output}/tiny"
    Path(f"{run}/checkpoints/step-00000010/rng.safetensors").write_bytes(b"damaged")
    longer = make(train__steps=16)
    assert check_inputs(longer, text).former_steps == 10
    assert prolong(longer, text) == 7
    assert [point.step for point in read_points(run, 100) if point.step > 7] == []


def test_a_decay_without_its_checkpoint_says_so(tiny: Make, text: TextTower) -> None:
    make = lambda **changes: with_absolute_paths(tiny(**WSD, **QUIET, optim__decay_steps=3, **changes))  # noqa: E731
    config = make(train__steps=10)
    train_steps(config, text)
    damaged = Path(f"{config.output}/tiny/checkpoints/step-00000007/rng.safetensors")
    damaged.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"Its checkpoint of step 7, where its decay begins, is absent\.$"):
        check_inputs(make(train__steps=16), text)


def test_a_cosine_does_not_go_back_to_its_warm_up(tiny: Make, text: TextTower) -> None:
    more = {**QUIET, "train__checkpoint_every": 3, "train__keep_last": 9}
    train_steps(with_absolute_paths(tiny(**more, train__steps=9)), text)
    with pytest.raises(CheckpointError, match=r"train\.steps: 9 there, 12 here"):
        check_inputs(with_absolute_paths(tiny(**more, train__steps=12)), text)


@pytest.mark.ray
def test_the_command_says_where_a_prolonged_run_continues_and_begins_another_mlflow_run(
    ray_cluster: None, tiny: Make, text: TextTower
) -> None:
    make = lambda **changes: with_absolute_paths(tiny(**WSD, **QUIET, optim__decay_steps=3, **changes))  # noqa: E731
    config = make(train__steps=6)
    train_steps(config, text)
    run, uri = f"{config.output}/tiny", tracking_uri(config.tracking, config.output)
    first = open_run(uri, "nev", "tiny", config, {}, config.output)
    save_mlflow_run_id(run, first.run_id)
    console = Console(file=StringIO(), width=400)
    second = run_experiment(make(train__steps=9), console)
    place = "prolonged from 6 to 9 steps: the run continues from step 3, where the learning rates part; what it has of later "
    assert f"{place}steps moves to {run}/ends/6-steps" in console.file.getvalue()
    assert list_steps(run) == [6, 9]
    assert verify(f"{run}/ends/6-steps/checkpoints/step-00000006")["step"] == 6
    client = MlflowClient(second.tracking_uri)
    new = client.get_run(second.mlflow_run_id)
    assert new.data.tags["nev.continues_run"] == first.run_id != second.mlflow_run_id
    assert new.data.params["train.steps"] == "9"
    steps = [point.step for point in client.get_metric_history(second.mlflow_run_id, "loss")]
    assert sorted(steps) == list(range(1, 10))
    rates = {point.step: point.value for point in client.get_metric_history(second.mlflow_run_id, "learning_rate")}
    assert rates[6] == 1e-3, "of the longer run, not of the decay before"


def fill_run(run: str) -> None:
    for step in (4, 8):
        location = checkpoint_location(run, step)
        write_atomic(f"{location}/model.safetensors", b"weights")
        write_atomic(f"{location}/state.json", json.dumps({"step": step}).encode())
        write_points(run, step, [make_point(step, {"loss": 1.0})])
    write_validation(run, make_point(8, {"top1": 0.5}))
    save_mlflow_run_id(run, "abc")


def check_end_set_aside(run: str) -> None:
    fill_run(run)
    assert set_end_aside(run, 8, after=4) == "abc"
    assert list_steps(run) == [4]
    assert [point.step for point in read_points(run, 100)] == [4]
    moved = [
        "metrics/step-00000008.jsonl",
        "metrics/validation-00000008.jsonl",
        "mlflow.json",
        "checkpoints/step-00000008/model.safetensors",
        "checkpoints/step-00000008/state.json",
    ]
    assert list_files(f"{run}/ends/8-steps") == sorted(moved)
    assert set_end_aside(run, 8, after=4) == "abc", "a start that was broken off knows the MLflow run, too"


def test_an_end_is_set_aside_in_a_folder(tmp_path: Path) -> None:
    check_end_set_aside(str(tmp_path / "run"))


def test_an_end_is_set_aside_on_s3(s3: Proxy) -> None:
    check_end_set_aside("s3://bucket/run")
