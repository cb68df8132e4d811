"""The training loop: alone on any machine with torch, and as a Ray job with real processes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.tiny import REFERENCE
from helpers.training import blocks, prepare_job, run_bare, run_straight_and_stopped, train_reader, weights
from mlflow import MlflowClient
from rich.console import Console
from safetensors.torch import save_file

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.paths import with_absolute_paths
from nev.data.block import Block
from nev.eval.validation.scoring import score_validation
from nev.eval.validation.vectors import load_vectors, vectors_file
from nev.models.text import TextTower
from nev.models.vision import build_vision
from nev.runs import checkpoint
from nev.runs.manifest import CheckpointError, latest_checkpoint, read_manifest
from nev.runs.towers import load_logit_scale
from nev.runs.tracking import Tracker, tracking_uri
from nev.storage.reading import DataError
from nev.train.driver.launcher import TrainingFailed
from nev.train.driver.resources import check_workers
from nev.train.experiment import Summary, run_experiment
from nev.train.job import find_resume_point
from nev.train.worker.batch import StreamError
from nev.train.worker.guards import Diverged
from nev.train.worker.quarantine import TooManyBadRows

Make = Callable[..., Experiment]
CPU = torch.device("cpu")


@pytest.mark.slow
def test_loss_falls_and_every_metric_is_reported(tiny: Make, text: TextTower) -> None:
    config = tiny()
    reported = run_bare(prepare_job(config, text), train_reader(config, text))
    assert sorted(reported) == list(range(1, 21))
    first, last = reported[1], reported[20]
    expected = {
        "loss",
        "learning_rate",
        "logit_scale",
        "grad_norm",
        "batch_accuracy",
        "images_per_s",
        "data_wait_share",
    }
    assert expected <= first.keys()
    assert first["loss"] == pytest.approx(math.log(64), rel=0.3)
    assert last["loss"] < 0.9 * first["loss"]
    assert {"zero_shot/top1", "zero_shot/top5", "retrieval/text_to_image/r10", "val/bad_rows"} <= last.keys()
    assert 0 <= last["data_wait_share"] <= 1


@pytest.mark.slow
def test_stopped_and_resumed_equals_undisturbed_bit_for_bit(tiny: Make, text: TextTower) -> None:
    dropout = {"vision__trunk_args__drop_path_rate": 0.2, "vision__trunk_args__proj_drop_rate": 0.1}
    whole, halves = tiny(name="whole", **dropout), tiny(name="halves", **dropout)
    straight, stopped = run_straight_and_stopped(whole, halves, text, step=7)
    assert [metrics["loss"] for metrics in straight.values()] == [stopped[step]["loss"] for step in straight]


def test_wrong_block_is_refused(tiny: Make, text: TextTower) -> None:
    config = tiny()
    job, reader = prepare_job(config, text), train_reader(config, text)
    stream = list(blocks(reader, job.plan, 0, 2))
    with pytest.raises(StreamError, match="gave block 1 where the plan says 0"):
        run_bare(job, reader, iter([stream[1], stream[0]]))
    with pytest.raises(StreamError, match="ended before block 1"):
        run_bare(job, reader, iter(stream[:1]))


def test_too_many_bad_rows_stop_the_run_and_name_the_shard(tiny: Make, text: TextTower) -> None:
    config = tiny(workers__count=2, data__limits__max_bytes=2000)  # most of the pictures are larger
    with pytest.raises(TooManyBadRows, match=r"Worst shards: 00000\.parquet \(\d+\).*image has"):
        run_bare(prepare_job(config, text), train_reader(config, text))
    quarantined = list(Path(config.output, "tiny", "quarantine").glob("*.parquet"))
    assert quarantined
    import pyarrow.parquet as pq

    row = pq.read_table(quarantined[0]).to_pylist()[0]
    assert "max_bytes" in row["reason"]
    shard = pq.ParquetFile(Path(config.data.train, row["shard"])).read_row_group(row["row_group"])
    assert shard["uid"][row["row"]].as_py() == row["uid"]


def test_invalid_rows_are_left_out_and_counted(tiny: Make, text: TextTower) -> None:
    config = tiny(data__max_bad_share=0.5, train__steps=3)
    job, reader = prepare_job(config, text), train_reader(config, text)

    def spoilt() -> Iterator[Block]:
        for block in blocks(reader, job.plan, 0, 3):
            block["valid"][:3] = False
            block["image"][:3] = 255
            yield block

    reported = run_bare(job, reader, spoilt())
    assert [reported[step]["bad_rows"] for step in (1, 2, 3)] == [6, 12, 18]
    assert all(math.isfinite(reported[step]["loss"]) for step in reported)
    assert (find_resume_point(job.run).step, find_resume_point(job.run).bad_rows) == (3, 18)


@pytest.mark.slow
def test_learned_scale_is_clamped_and_a_fixed_one_stays(tiny: Make, text: TextTower) -> None:
    clamped = tiny(name="clamped", loss__init_scale=50, loss__max_scale=50, train__steps=3)
    assert run_bare(prepare_job(clamped, text), train_reader(clamped, text))[3]["logit_scale"] <= 50 * (1 + 1e-6)
    fixed = tiny(name="fixed", loss__learn_scale=False, train__steps=3)
    reported = run_bare(prepare_job(fixed, text), train_reader(fixed, text))
    assert reported[3]["logit_scale"] == pytest.approx(1 / 0.07)
    learned = tiny(name="learned", train__steps=3)
    assert run_bare(prepare_job(learned, text), train_reader(learned, text))[3]["logit_scale"] != pytest.approx(
        1 / 0.07
    )


@pytest.mark.slow
def test_bf16_autocast_trains(tiny: Make, text: TextTower) -> None:
    config = tiny(train__precision="bf16", train__steps=3)
    reported = run_bare(prepare_job(config, text), train_reader(config, text))
    assert all(math.isfinite(metrics["loss"]) for metrics in reported.values())
    assert all(value.dtype == torch.float32 for value in weights(prepare_job(config, text).run, 3).values())


@pytest.mark.slow
def test_another_experiment_under_the_same_name_is_refused(tiny: Make, text: TextTower) -> None:
    config = tiny(train__steps=2)
    run_bare(prepare_job(config, text), train_reader(config, text))
    with pytest.raises(CheckpointError, match=r"optim\.lr: 0\.001 there, 0\.5 here"):
        prepare_job(tiny(train__steps=2, optim__lr=0.5), text)
    with pytest.raises(CheckpointError, match="fingerprint of the plan"):
        prepare_job(tiny(train__steps=2, seed=1), text)
    prepare_job(tiny(train__steps=2, workers__count=2, train__keep_last=5), text)  # these do not touch what is computed


def test_a_metric_that_is_not_measured_is_refused(tiny: Make, text: TextTower) -> None:
    with pytest.raises(ConfigError, match=r"eval\.best = 'zero_shot/topp1' is not measured.*zero_shot/top1"):
        prepare_job(tiny(eval__best="zero_shot/topp1"), text)


def test_labels_beyond_the_classes_are_refused(tiny: Make, text: TextTower) -> None:
    with pytest.raises(DataError, match=r"label 29, but eval\.zero_shot\.classes names 3 classes"):
        prepare_job(tiny(eval__zero_shot__classes=["a", "b", "c"]), text)


def test_a_loss_that_is_no_number_stops_the_run_before_its_checkpoint(tiny: Make, text: TextTower) -> None:
    config = tiny(train__steps=20, train__checkpoint_every=1, train__log_every=20, optim__warmup_steps=0)
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 1e30})})
    job = prepare_job(config, text)
    with pytest.raises(
        Diverged, match=r"11 of the last 1,000 steps had no finite loss .* at learning rate \S+, loss None"
    ):
        run_bare(job, train_reader(config, text))
    newest = latest_checkpoint(job.run)
    assert newest is None or all(torch.isfinite(tensor).all() for tensor in checkpoint.load_model(newest)[1].values())


@pytest.mark.slow
def test_a_resumed_run_needs_no_pretrained_weights(tiny: Make, text: TextTower, tmp_path: Path) -> None:
    trunk = build_vision(tiny().vision, 32, text.width).trunk
    file = tmp_path / "trunk.safetensors"
    save_file(trunk.state_dict(), file)
    config = tiny(train__steps=4, vision__weights=str(file))
    run_bare(prepare_job(config, text, stop_after=2), train_reader(config, text))
    file.unlink()
    run_bare(prepare_job(config, text), train_reader(config, text))
    assert find_resume_point(prepare_job(config, text).run).step == 4


def test_a_vision_tower_that_cannot_be_is_refused_before_ray_starts(
    tiny: Make, text: TextTower, tmp_path: Path
) -> None:
    trunk = build_vision(tiny().vision, 32, text.width).trunk
    save_file(trunk.state_dict(), tmp_path / "trunk.safetensors")
    cases: dict[str, dict[str, object]] = {
        r"timm has no model 'vit_tinny_patch16_224'\. Close: vit_tiny": {"vision__trunk": "vit_tinny_patch16_224"},
        r"takes no argument 'dept'\. Close: depth": {"vision__trunk_args__dept": 2},
        r"nowhere\.safetensors: no such file": {"vision__weights": "nowhere.safetensors"},
        r"does not fit trunk .*\n  of another shape: \S+ \(.*\) for \(.*\), .* and \d+ more": {
            "vision__weights": str(tmp_path / "trunk.safetensors"),
            "vision__trunk_args__embed_dim": 128,
        },
    }
    for message, change in cases.items():
        with pytest.raises(ConfigError, match=message):
            prepare_job(tiny(**change), text)


@pytest.mark.slow
def test_a_run_that_knew_fewer_settings_goes_on(tiny: Make, text: TextTower) -> None:
    config = tiny(train__steps=2)
    job = prepare_job(config, text)
    run_bare(job, train_reader(config, text))
    file = Path(f"{latest_checkpoint(job.run)}/state.json")
    manifest = json.loads(file.read_text())
    del manifest["config"]["lock"]
    del manifest["config"]["guards"]
    file.write_text(json.dumps(manifest))
    prepare_job(config, text)
    with pytest.raises(CheckpointError, match=r"lock: 'text' there, 'none' here"):
        prepare_job(config.model_copy(update={"lock": "none"}), text)


def test_the_vectors_of_the_validation_are_in_the_checkpoint(tiny: Make, text: TextTower) -> None:
    job = prepare_job(tiny(train__steps=2), text)
    run_bare(job, train_reader(job.config, text))
    newest = latest_checkpoint(job.run)
    assert newest
    assert job.validation
    kept = load_vectors(newest, job.validation)
    assert kept
    assert score_validation(job.validation, *kept, load_logit_scale(newest)) == read_manifest(newest)["metrics"]
    assert vectors_file(job.validation) in read_manifest(newest)["sha256"], "checksummed with the rest"


def test_best_without_a_validation_set_is_refused(tiny: Make, text: TextTower) -> None:
    with pytest.raises(ConfigError, match=r"needs a validation set"):
        prepare_job(tiny(data__val=None), text)


def test_output_that_would_be_lost_is_refused(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"gs://bucket/runs: .* not gs:"):
        with_absolute_paths(tiny(output="gs://bucket/runs"))
    assert with_absolute_paths(tiny(output="s3://bucket/runs")).output == "s3://bucket/runs"
    uploaded = tmp_path / "working_dir_files" / "_ray_pkg_1"  # where Ray unpacks a submitted working folder
    uploaded.mkdir(parents=True)
    monkeypatch.chdir(uploaded)
    with pytest.raises(ConfigError, match="is deleted with its node"):
        with_absolute_paths(tiny(output="runs"))
    assert with_absolute_paths(tiny(output=str(tmp_path))).output == str(tmp_path)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"workers__gpus": 1}, r"workers\.count = 1 times workers\.gpus = 1 are more than this machine's 0 GPUs"),
        ({"workers__count": 2, "workers__cpus": 1}, r"workers\.cpus = 1 leave none of this machine's 2 CPUs to decode"),
        ({"workers__cpus": 1.5}, r"workers\.cpus = 1\.5 leave none"),
        ({"workers__min": 1, "workers__max": 2, "workers__cpus": 1, "workers__count": None}, r"workers\.max = 2 times"),
    ],
)
def test_workers_that_would_wait_for_ever_are_refused(
    asked: dict[str, float], message: str, ray_cluster: None, tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(**asked)
    with pytest.raises(ConfigError, match=message):
        run_experiment(config, Console(quiet=True))
    store = MlflowClient(tracking_uri=tracking_uri(config.tracking, config.output))
    assert store.get_experiment_by_name("nev") is None, "no run is left behind in MLflow"
    check_workers(tiny(workers__cpus=1).workers)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    check_workers(config.workers)  # an autoscaler may bring what is missing


def curve(summary: Summary) -> list[float]:
    return Tracker(summary.tracking_uri, summary.mlflow_run_id).history("loss")[1]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_ray_one_worker_and_two_agree(reference_run: Summary, tiny: Make) -> None:
    """The loss curves of one worker and of two are the same, to rounding."""
    two = run_experiment(tiny(name="two", workers__count=2, **REFERENCE), Console(quiet=True))
    left, right = curve(reference_run), curve(two)
    assert len(left) == len(right) == 30
    assert max(abs(a - b) for a, b in zip(left, right, strict=True)) < 1e-4
    assert left[-1] < 0.8 * left[0]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_ray_bad_rows_end_the_run_with_their_error(ray_cluster: None, tiny: Make) -> None:
    config = tiny(workers__count=2, data__limits__max_bytes=2000)
    with pytest.raises(TrainingFailed, match=r"Worst shards: 00000\.parquet"):
        run_experiment(config, Console(quiet=True))
