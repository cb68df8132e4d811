"""The convention of the benchmarks: turns, medians, the table, the JSON; and what the contestants of `train` compute."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import report
from benchmarks.contestants import open_clip, processes, ray_job
from nev.config import load

REPO = Path(__file__).parents[1]
BENCHMARKS = sorted(path for path in (REPO / "benchmarks").glob("*.py") if path.name != "report.py")


def test_contestants_take_turns_and_the_order_turns_round() -> None:
    count, calls = itertools.count(1), []

    def contestant(name: str) -> float:
        calls.append(name)
        return float(next(count))

    results = report.measure_interleaved({"a": lambda: contestant("a"), "b": lambda: contestant("b")}, 3)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert results == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}


def test_measuring_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        report.measure_interleaved({"a": lambda: 1.0}, 0)


def test_the_report_holds_medians_and_the_medians_of_ratios_within_a_round(tmp_path: Path) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    # Machines change speed between rounds. The medians would give 150 / 45; the rounds give 3, 2 and 6.
    figures = {"ours_images_per_s": [300.0, 90.0, 150.0], "theirs_images_per_s": [100.0, 45.0, 25.0]}
    ratios = {"ours_vs_theirs": report.Ratio("ours_images_per_s", "theirs_images_per_s", goal=2.0)}
    path = report.write("demo", "python demo", figures, ratios, ["a note"], tmp_path, console)
    written = json.loads(path.read_text())
    assert path == tmp_path / "demo.json"
    assert {"command", "date", "hardware", "versions", "figures", "ratios"} <= set(written)
    assert written["figures"] == {"ours_images_per_s": 150.0, "theirs_images_per_s": 45.0}
    assert written["ratios"] == {"ours_vs_theirs": 3.0}
    assert written["goals"] == {"ours_vs_theirs": 2.0}
    assert written["repetitions"]["ours_vs_theirs"] == [3.0, 2.0, 6.0]
    assert written["repetitions"]["ours_images_per_s"] == [300.0, 90.0, 150.0]
    assert {"cpu", "cores", "memory_gib", "gpu", "load_before"} <= set(written["hardware"])
    assert {"python", "torch", "ray", "timm", "pyarrow"} <= set(written["versions"])
    shown = console.export_text()
    assert "ours_vs_theirs" in shown
    assert "at least 2" in shown
    assert "a note" in shown


def test_a_ratio_of_what_was_not_measured_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no figure b"):
        report.write("demo", "", {"a": [1.0]}, {"r": report.Ratio("a", "b")}, folder=tmp_path)
    with pytest.raises(ValueError, match="a has 1 repetitions and b 2"):
        report.write("demo", "", {"a": [1.0], "b": [1.0, 2.0]}, {"r": report.Ratio("a", "b")}, folder=tmp_path)
    with pytest.raises(ValueError, match="without a repetition: a"):
        report.write("demo", "", {"a": []}, {}, folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("python benchmarks/train.py --set data.train=/mnt/x/cifar10/train", "data.train=…/cifar10/train"),
        ("--results /mnt/x/out --steps 5", "--results …/x/out --steps 5"),
        ("--output ~/secret/place/here", "--output …/place/here"),
        ("NEV_DATA=../shared/data make bench NAME=train", "NEV_DATA=../shared/data make bench NAME=train"),
        ("configs/cifar10.yaml, images/s", "configs/cifar10.yaml, images/s"),
        ("s3://bucket/train", "s3://bucket/train"),
    ],
)
def test_no_path_of_the_machine_is_written(given: str, kept: str) -> None:
    written = report.without_paths(given)
    assert written.endswith(kept)
    assert "/mnt" not in written


def test_a_rate_sums_the_windows_after_the_warm_up() -> None:
    # Batch 10, windows of 2 steps: 20 rows in 4, 2, 1 and 1 s.
    rates = ray_job.summed([2, 4, 6, 8], [5.0, 10.0, 20.0, 20.0], [0.9, 0.5, 0.0, 0.1], batch=10, warm_up=2)
    assert rates.images_per_s == pytest.approx(60 / 4)
    assert rates.images_per_s_from_start == pytest.approx(80 / 8)
    assert rates.data_wait_share == pytest.approx((0.5 * 2 + 0.1) / 4)
    with pytest.raises(processes.BenchmarkFailed, match="give more --steps"):
        ray_job.summed([2], [5.0], [0.0], batch=10, warm_up=2)


def test_open_clip_gets_the_tower_of_the_config(tmp_path: Path) -> None:
    config = load(REPO / "configs" / "flickr8k.yaml")
    open_clip.write_model(config, tmp_path / "model")
    model = json.loads((tmp_path / "model" / "open_clip_config.json").read_text())["model_cfg"]
    vision = {key: model["vision_cfg"][key] for key in ("image_size", "patch_size", "width", "layers", "head_width")}
    assert vision == {"image_size": 112, "patch_size": 16, "width": 192, "layers": 6, "head_width": 32}
    assert model["embed_dim"] == 384
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    assert not list((tmp_path / "model").glob("*.safetensors")), "open_clip would load them as a CLIP checkpoint"
    args = open_clip.arguments(config, 15, [Path("a.tar"), Path("b.tar")], tmp_path / "model", freeze_layer_norm=True)
    given = dict(itertools.pairwise(args))
    assert given["--batch-size"] == "256"
    assert given["--train-data"] == "a.tar::b.tar"
    assert given["--aug-cfg"] == "scale=(0.5, 1.0)"
    assert args[-2:] == ["--lock-text", "--lock-text-freeze-layer-norm"]


def test_a_step_of_open_clips_log_is_read() -> None:
    line = "Train Epoch: 0 [ 512/7936 (6%)] Data (t): 0.004 Batch (t): 6.712, 38.1401/s, 38.1401/s/gpu LR: 0.000040"
    found = open_clip.STEP.search(line)
    assert found
    assert float(found[1]) == 6.712


def test_a_process_that_fails_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("print('began')\nraise SystemExit('no such tar')\n")
    with (
        processes.lines_of_module("fails", [], tmp_path) as lines,
        pytest.raises(processes.BenchmarkFailed, match="no such tar"),
    ):
        assert list(lines) == ["began\n"]


def test_a_process_is_ended_when_enough_was_read(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text("import time\nprint('began', flush=True)\ntime.sleep(600)\n")
    with processes.lines_of_module("endless", [], tmp_path) as lines:
        assert next(lines) == "began\n"


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.name)
def test_every_benchmark_answers_help(path: Path) -> None:
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout
