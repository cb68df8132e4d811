"""The benchmark of a locked trunk: what it reports, and that its pieces measure what they say, at a small size, without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.frozen import make_frozen, save_trunk, write_features
from rich.console import Console

from benchmarks import frozen, report
from benchmarks.contestants import heads, photos, processes, ray_job, vectors
from nev.config.experiment import Experiment

ROWS, BATCH, WIDTH = 1536, 512, 64


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A small set of vectors in two shards, and its experiment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "SHARD", 1024)
        patch.setattr(vectors, "TRUNK", vectors.TRUNK | {"embed_dim": WIDTH, "num_heads": 2})
        patch.setattr(vectors, "ENCODER", vectors.ENCODER | {"hidden_size": WIDTH, "num_attention_heads": 2})
        patch.setattr(vectors, "WIDTH", WIDTH)
        return vectors.write_vectors(tmp_path_factory.mktemp("vectors"), ROWS, BATCH, 256)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)


def test_a_feature_is_a_mixture_of_its_text(head: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts = heads.read_vectors(head)
    assert images.shape == texts.shape == (ROWS, WIDTH)
    assert images.dtype == texts.dtype == torch.float32
    assert texts.norm(dim=1).numpy() == pytest.approx(1, abs=1e-3)
    assert len(texts.unique(dim=0)) == ROWS
    monkeypatch.setattr(vectors, "WIDTH", WIDTH)
    drawn = [vectors.draw(shard, rows) for shard, rows in ((0, 1024), (1, 512))]
    np.testing.assert_array_equal(images.numpy(), np.concatenate([features for _, features in drawn]))
    np.testing.assert_allclose(texts.numpy(), np.concatenate([text for text, _ in drawn]), atol=1e-3)


def test_nevs_loop_learns_from_the_vectors(head: Experiment) -> None:
    job, reader = heads.prepare_head(head.model_copy(update={"name": "learns"}), 30)
    losses = heads.losses_here(job, reader)
    assert losses[30] < losses[10] - 0.3


def test_a_large_step_is_measured(head: Experiment) -> None:
    train = head.train.model_copy(update={"log_every": 1})
    job, reader = heads.prepare_head(head.model_copy(update={"name": "large", "train": train}), heads.LARGE_STEPS)
    cost = heads.large_step(job, reader)
    assert cost.seconds > 0
    assert 0.1 < cost.gib < 8


@pytest.mark.parametrize("own_loss", [False, True])
def test_the_bare_loop_runs(head: Experiment, own_loss: bool) -> None:
    assert heads.bare_loop(head, 5, own_loss) > 0


@pytest.mark.slow
def test_the_bare_trunk_and_both_modes(
    tiny: Callable[..., Experiment], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over drawn pictures, with a small ViT in the place of the package's trunk."""
    config = make_frozen(tiny, tmp_path, vision__pool="mean", vision__standardise=True, data__mean=[0.5] * 3)
    config = config.model_copy(update={"data": config.data.model_copy(update={"std": (0.5, 0.5, 0.5)})})
    write_features(config)
    overrides = [f"data.train={pictures / 'train'}", f"vision.weights={save_trunk(tmp_path)}", "data.image_size=32"]
    overrides += ["vision.trunk=vit_tiny_patch16_224", f"vision.trunk_args={json.dumps(config.vision.trunk_args)}"]
    assert photos.online_vs_sidecar(overrides, tmp_path / "modes", steps=6, batch=32) < 1e-3
    sizes = [*overrides[:-1], f"vision.trunk_args={json.dumps({**config.vision.trunk_args, 'img_size': 32})}"]
    monkeypatch.setattr(photos, "DECODED", 64)
    assert photos.forward_per_s(sizes, (16, 64), 0.05) > 0


def test_the_recalls_of_a_run_are_read(tmp_path: Path) -> None:
    metrics = {"text_to_image_r10": 0.4, "text_to_image_r10_low": 0.38, "text_to_image_r10_high": 0.42}
    metrics |= {"image_to_text_r10": 0.5, "text_to_image_r1": 0.1, "text_to_image_r5": 0.2}
    task = {"name": "retrieval", "kind": "retrieval", "metric": "text_to_image_r10", "metrics": metrics}
    suite = {"suite": "validation", "about": "", "checkpoint": "", "model": "", "step": 2, "average": None}
    config = photos.load(photos.CONFIG, photos.overrides_for(tmp_path))
    folder = tmp_path / "runs" / config.name / "evaluation"
    folder.mkdir(parents=True)
    with pytest.raises(processes.BenchmarkFailed, match="0 results of a validation"):
        photos.read_recalls(config)
    (folder / "validation-00000002.json").write_text(json.dumps({**suite, "seconds": 1.0, "tasks": [task]}))
    assert photos.read_recalls(config) == {name: value for name, value in metrics.items() if "r5" not in name}


def test_the_rate_of_embed_images_is_that_of_its_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = photos.overrides_for(tmp_path)
    before = tmp_path / "data/train/_image"
    before.mkdir(parents=True)

    def run(script: str, *args: str) -> str:
        assert script == "pipelines/embed_images.py"
        assert not before.exists(), "sidecars of before would be skipped"
        return "pictures embedded 12 of 7,000, 9 pictures/s\n2 sidecars written, 7,000 pictures, 1,085 pictures/s\n"

    monkeypatch.setattr(photos, "run_script", run)
    assert photos.embed_images(overrides).pictures_per_s == 1085
    monkeypatch.setattr(photos, "run_script", lambda *args: "0 sidecars written, 7,000 pictures\n")
    with pytest.raises(processes.BenchmarkFailed, match="no rate"):
        photos.embed_images(overrides)


def test_flickr8k_or_the_reason_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "NEV_DATA" in str(photos.not_there(tmp_path))
    (tmp_path / "flickr8k/train").mkdir(parents=True)
    (tmp_path / "flickr8k/train/0.tar").touch()
    assert photos.not_there(tmp_path) in (None, f"{photos.PACKAGE} is not installed (pip install 'nev[photos]')")
    monkeypatch.setattr(photos, "PACKAGE", "no-such-package")
    assert "pip install 'nev[photos]'" in str(photos.not_there(tmp_path))


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contestants that answer at once."""
    recalls = dict.fromkeys(photos.RECALLS, 0.4)
    answers: dict[object, object] = {
        photos.from_nothing: {"prepare_s": 9.0, "train_s": 60.0, **recalls},
        photos.make_set: ["a=b"],
        photos.forward_per_s: 100.0,
        photos.online_vs_sidecar: 1e-5,
        vectors.write_vectors: vectors_config(),
        heads.stream_rows_per_s: 9000.0,
        heads.prepare_head: ("job", "reader"),
        heads.large_step: heads.Large(150.0, 2.0),
    }

    def answer(contestant: object, *args: object) -> object:
        if contestant is heads.bare_loop:
            return 6000.0 if args[2] else 8000.0
        return answers[contestant]

    monkeypatch.setattr(processes, "in_own_process", answer)
    monkeypatch.setattr(ray_job, "ray_job", lambda config, steps: ray_job.JobRates(4800.0, 4000.0, 0.1))
    monkeypatch.setattr(photos, "embed_images", lambda overrides: photos.Embedded(90.0, 80.0))


def vectors_config() -> Experiment:
    return photos.load(photos.CONFIG)


def test_frozen_reports_its_figures(answered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "not_there", lambda data: None)
    frozen.main(tmp_path, repetitions=2, flickr_rounds=2, results=tmp_path)
    written = json.loads((tmp_path / "frozen.json").read_text())
    assert written["ratios"] == {
        "head_training_vs_bare_loop": 0.6,
        "head_training_vs_bare_loop_own_loss": 0.8,
        "embed_images_vs_forward": 0.9,
    }
    assert written["goals"] == {
        "head_training_vs_bare_loop": 0.7,
        "embed_images_vs_forward": 0.85,
        "train_s": 90,
        "step_65536_peak_gib": 3,
        "online_vs_sidecar_loss": 1e-3,
    }
    assert written["repetitions"]["train_s"] == [60.0, 60.0]
    assert written["figures"]["embed_images_wall_s"] == 80.0
    assert written["figures"]["head_training_data_wait_share"] == 0.1
    assert written["figures"]["step_65536_s"] == 150.0


def test_frozen_says_what_it_leaves_out(answered: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frozen.main(tmp_path, repetitions=1, large=False, results=tmp_path)
    assert "left out: no flickr8k/train/*.tar" in capsys.readouterr().out
    written = json.loads((tmp_path / "frozen.json").read_text())
    assert not {"train_s", "step_65536_s"} & {*written["figures"], *written["goals"]}


def test_a_goal_of_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    goals = {"peak_gib": report.Goal(3, at_most=True)}
    report.write("x", "run", {"peak_gib": [2.0]}, {}, folder=tmp_path, goals=goals)
    assert "at most 3" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.json").read_text())["goals"] == {"peak_gib": 3}
    with pytest.raises(ValueError, match="goals of no figure: peak_gib"):
        report.write("x", "run", {"other": [2.0]}, {}, folder=tmp_path, console=Console(quiet=True), goals=goals)
