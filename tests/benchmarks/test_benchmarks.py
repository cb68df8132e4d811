"""The convention of the benchmarks: turns, medians, the table, the JSON; and what the contestants of `train` compute."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console

from benchmarks import data, report, train
from benchmarks.contestants import open_clip, pictures, processes, ray_job, streams
from nev.config.experiment import Experiment
from nev.config.file import load

REPO = Path(__file__).parents[2]
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


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`train` with contestants that answer at once, in images/s.

    nev 180 (150 alone), the bare loop 200 (240 with nev's layers), open_clip 45 and 60.
    """

    def job(config: Experiment, steps: int) -> ray_job.JobRates:
        assert config.data.val is None
        return ray_job.JobRates(180.0 if config.workers.count == 2 else 150.0, 170.0, 0.1)

    monkeypatch.setattr(ray_job, "ray_job", job)
    monkeypatch.setattr(processes, "in_own_process", lambda loop, config, steps, own: 240.0 if own else 200.0)
    monkeypatch.setattr(processes, "run_script", lambda script, *args: "")
    monkeypatch.setattr(open_clip, "open_clip_lit", lambda config, steps, tars, freeze: 60.0 if freeze else 45.0)
    monkeypatch.setattr(open_clip, "not_installed", list)
    monkeypatch.setenv("NEV_DATA", str(tmp_path))
    for file in ("shards/00000.parquet", "flickr8k/train/00000.tar"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    return tmp_path


def run_train(folder: Path, shards: str = "shards") -> dict[str, dict[str, float]]:
    configs = [str(REPO / path) for path in train.CONFIGS]
    train.main(configs, [f"data.train={folder / shards}"], repetitions=2, one_worker=True, results=folder)
    return json.loads((folder / "train.json").read_text())


def test_train_reports_the_ratios_of_its_contestants(measured: Path) -> None:
    written = run_train(measured)
    assert written["ratios"] == {
        "ray_vs_bare_loop_cifar10": 0.9,
        "ray_vs_bare_loop": 0.9,
        "ray_vs_bare_loop_flickr8k": 0.9,
        "ray_vs_bare_loop_own_layers_cifar10": 0.75,
        "ray_vs_bare_loop_own_layers_flickr8k": 0.75,
        "vs_open_clip_lit": 4.0,
        "vs_open_clip_lit_frozen_layer_norm": 3.0,
    }
    assert written["figures"]["cifar10_ray_job_one_worker_images_per_s"] == 150.0
    assert written["figures"]["flickr8k_ray_job_data_wait_share"] == 0.1
    assert written["repetitions"]["flickr8k_bare_loop_images_per_s"] == [200.0, 200.0]
    assert str(measured) not in json.dumps(written)


def test_without_open_clip_its_ratio_is_left_out_and_the_reason_shown(
    measured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(open_clip, "not_installed", lambda: ["webdataset"])
    assert not [key for key in run_train(measured)["ratios"] if "open_clip" in key]
    assert "uv pip install --group bench" in capsys.readouterr().out


def test_without_shards_the_command_that_makes_them_is_named(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit):
        run_train(measured, "elsewhere")
    assert "nev prepare --help" in capsys.readouterr().err


HELP = """
import runpy, sys
root, *files = sys.argv[1:]
for file in files:
    sys.argv, sys.path[0] = [file, "--help"], root  # as `python FILE --help` has them
    print("begin", file)
    try:
        runpy.run_path(file, run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 0, file
"""


@pytest.mark.slow
def test_every_benchmark_answers_help() -> None:
    """In one process, whose imports they share."""
    root = REPO / "benchmarks"
    done = subprocess.run([sys.executable, "-c", HELP, root, *BENCHMARKS], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.split("begin ")[1:]
    for path, help_text in zip(BENCHMARKS, shown, strict=True):
        assert help_text.startswith(str(path))
        assert "--help" in help_text, path.name


def test_data_reports_the_ratios_of_both_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`data` with contestants that answer at once: nev 180 images/s, the DataLoader 150, open_clip 60, the limit 200."""
    answers = {
        streams.nev_stream: streams.StreamFigures(180.0, 1.0, 0.5, 0.55),
        streams.dataloader: 150.0,
        streams.open_clip_stream: 60.0,
        streams.limit: 200.0,
        streams.tar_mb_per_s: (1000.0, 600.0),
        streams.copies: {"arrow": 100.0, "crop": 50.0, "object_store": 150.0, "consumer": 0.0},
    }
    for name in ("imagenet_sample", "flickr8k"):
        made = pictures.Pictures(name, "shards", ["0.tar"], 4096, "index")
        monkeypatch.setattr(pictures, name, lambda data, folder, rows, made=made: made)
    monkeypatch.setattr(processes, "in_own_process", lambda contestant, *args: answers[contestant])
    monkeypatch.setattr(open_clip, "not_installed", list)
    data.main(tmp_path, repetitions=2, results=tmp_path)
    written = json.loads((tmp_path / "data.json").read_text())
    ratios = {"dataloader": 1.2, "open_clip": 3.0, "limit": 0.9}
    for end in ("", "_flickr8k"):
        assert {kind: written["ratios"][f"stream_vs_{kind}{end}"] for kind in ratios} == ratios
        assert written["ratios"][f"resume_last_vs_first{end}"] == 1.1
        assert written["ratios"][f"tar_in_place_vs_parquet{end}"] == 1.0
    assert written["ratios"]["index_tars_vs_read"] == 0.6
    assert written["figures"]["first_batch_s"] == 1.0
    assert written["figures"]["bytes_copied_per_row"] == 300.0
    assert written["repetitions"]["flickr8k_limit_images_per_s"] == [200.0, 200.0]


def test_a_goal_may_be_a_bound_from_above(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ratios = {"slower": report.Ratio("late_s", "early_s", 1.2, at_most=True)}
    report.write("x", "run", {"late_s": [2.0], "early_s": [1.0]}, ratios, folder=tmp_path)
    assert "at most 1.2" in capsys.readouterr().out


def test_a_tenth_of_a_run_is_its_own_batches() -> None:
    from benchmarks.memory import TENTHS, Sample, highest

    found = [Sample(number, number, 2.0 * number) for number in range(400)]
    assert [highest(found, "object_store", tenth, 40) for tenth in TENTHS.values()] == [79, 199, 279, 399]
    assert highest(found, "heap", 0, 40) == 78
