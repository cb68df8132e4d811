"""Ablations: from a file to trials, what trials share, and real sweeps on Ray Tune that are killed and go on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from mlflow import MlflowClient
from PIL import Image
from ray.util import placement_group_table
from rich.console import Console

import nev.sweep.run
from nev.config import Experiment
from nev.config_base import ConfigError
from nev.config_file import parse, read_yaml, to_yaml
from nev.data.index import build_index
from nev.data.storage import filesystem
from nev.eval.scoring import measure_names
from nev.eval.suite import METRICS, load_suite
from nev.eval.validation import Validation
from nev.sweep.config import Sweep
from nev.sweep.follower import numbers
from nev.sweep.mlflow_runs import open_parent, publish
from nev.sweep.report import read_sweep
from nev.sweep.results import Outcome, TrialResult
from nev.sweep.run import concurrent, refuse_unmeasured, run_sweep, share, with_threads
from nev.sweep.suite_data import read_suite
from nev.sweep.trials import named, plan_trials, reference_of
from nev.tracking import open_run
from nev.train.manifest import latest
from nev.train.setup import val_reader

if TYPE_CHECKING:
    from s3_server import Proxy

ROOT = Path(__file__).parent.parent
ABLATIONS = ROOT / "configs" / "ablations"
SHIPPED = sorted([*ABLATIONS.glob("*.yaml"), *(ABLATIONS / "paper").glob("*.yaml")])


@pytest.fixture
def base(tiny: Callable[..., Experiment], tmp_path: Path) -> str:
    path = tmp_path / "base.yaml"
    path.write_text(to_yaml(tiny()))
    return str(path)


def raw(base: str, **settings: object) -> dict[str, Any]:
    return {
        "name": "sizes",
        "base": base,
        "axes": {"train.global_batch": [32, 64, 128]},
        "seeds": [0, 1],
        "samples": 640,
        "metrics": ["zero_shot/top1"],
        **settings,
    }


def sweep(base: str, **settings: object) -> Sweep:
    return parse(Sweep, raw(base, **settings))


def test_every_trial_sees_the_same_number_of_samples(base: str) -> None:
    trials = plan_trials(sweep(base), [])
    assert len(trials) == 6
    assert {trial.experiment.train.samples for trial in trials} == {640}
    assert {trial.experiment.train.steps for trial in trials} == {None}
    assert [(t.experiment.train.global_batch, t.experiment.seed) for t in trials[:3]] == [(32, 0), (32, 1), (64, 0)]
    assert len({trial.name for trial in named(sweep(base), trials, [""] * 6)}) == 6


@pytest.mark.parametrize(("rule", "expected"), [("constant", 1e-3), ("linear", 2e-3), ("sqrt", 2**0.5 * 1e-3)])
def test_learning_rate_rule_against_the_base(base: str, rule: str, expected: float) -> None:
    trials = plan_trials(sweep(base, lr_rule=rule), [])
    largest = next(t.experiment for t in trials if t.experiment.train.global_batch == 128)
    assert largest.optim.lr == pytest.approx(expected)
    assert largest.optim.warmup_steps == round(5 / 2)


def test_what_yaml_takes_for_text_is_a_number_all_the_same(base: str) -> None:
    """1e-3 has no dot, so YAML reads text; and a warm-up of half a step is one."""
    trials = plan_trials(
        sweep(base, axes={"optim.lr": ["1e-3"]}, seeds=[0]), ["optim.warmup_steps=1", "train.eval_every=8"]
    )
    assert trials[0].experiment.optim.lr == 1e-3
    large = sweep(base, axes={"train.global_batch": [128, 256]}, seeds=[0])
    found = [trial.experiment for trial in plan_trials(large, ["optim.warmup_steps=1", "train.eval_every=8"])]
    assert [(one.optim.warmup_steps, one.train.eval_every) for one in found] == [(1, 4), (1, 2)]


def test_the_rule_is_an_axis_and_named_arms_set_several_things(base: str) -> None:
    axes = {
        "lr_rule": ["constant", "linear"],
        "head": {
            "mean": {"vision.pool": "mean"},
            "slow map": {"vision.pool": "map", "optim.lr": 5e-4, "train.global_batch": 128},
        },
    }
    wanted = sweep(base, axes=axes, seeds=[3])
    trials = plan_trials(wanted, [])
    assert {trial.experiment.eval.patience for trial in trials} == {None}
    found = [(dict(t.arm), t.experiment.vision.pool, t.experiment.optim.lr) for t in trials]
    assert found == [
        ({"lr_rule": "constant", "head": "mean"}, "mean", 1e-3),
        ({"lr_rule": "constant", "head": "slow map"}, "map", 5e-4),
        ({"lr_rule": "linear", "head": "mean"}, "mean", 1e-3),
        ({"lr_rule": "linear", "head": "slow map"}, "map", 1e-3),
    ]
    assert dict(reference_of(wanted)) == {"lr_rule": "constant", "head": "mean"}
    other = sweep(base, axes=axes, reference={"head": "slow map"})
    assert dict(reference_of(other)) == {"lr_rule": "constant", "head": "slow map"}


def test_a_search_draws_the_same_settings_at_every_start(base: str) -> None:
    search = {"optim.lr": {"loguniform": [1e-4, 1e-2]}, "loss.init_scale": {"choice": [10.0, 14.0]}}
    wanted = sweep(base, axes={}, search=search, draws=5, seeds=[0])
    rates = [trial.experiment.optim.lr for trial in plan_trials(wanted, [])]
    assert rates == [trial.experiment.optim.lr for trial in plan_trials(wanted, [])]
    assert len(set(rates)) == 5
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    few = sweep(base, axes={}, search={"loss.init_scale": {"choice": [10.0, 14.0]}}, draws=2, seeds=[0])
    assert {trial.experiment.loss.init_scale for trial in plan_trials(few, [])} == {10.0, 14.0}
    with pytest.raises(ConfigError, match="draws = 3: the search has 2 different settings"):
        plan_trials(few.model_copy(update={"draws": 3}), [])


def test_a_name_says_what_is_trained(base: str) -> None:
    def names(*overrides: str, data: str = "", **settings: object) -> set[str]:
        wanted = sweep(base, **settings)
        trials = plan_trials(wanted, list(overrides))
        return {trial.name for trial in named(wanted, trials, [data] * len(trials))}

    assert names() == names("workers.threads=2", "output=elsewhere", "guards.max_skipped=3")
    for change in ("optim.betas=[0.9, 0.99]", "eval={}"):
        assert not names() & names(change), change
    for free in (
        "train.micro_batch=32",
        "train.keep_last=5",
        "eval.batch=16",
        "data.max_bad_share=0.5",
        "data.train=moved",
    ):
        assert names() == names(free), free
    assert not names() & names(samples=1280)
    assert not names() & names(data="other")
    same = {"arm": {"one": {}, "two": {"optim.lr": 1e-3}, "three": {"optim.lr": 2e-3}}}
    assert len(names(axes=same, seeds=[0])) == 2, "two arms of the same settings are trained once"
    weights = Path(base).with_name("trunk.safetensors")
    found = []
    for content in (b"one", b"two"):
        weights.write_bytes(content)
        found.append(names(f"vision.weights={weights}"))
    assert not found[0] & found[1], "the same file with other weights in it"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"axes": {}}, "nothing to vary"),
        ({"axes": {"train.global_batch": []}}, "one at least"),
        ({"axes": {"train.global_batch": [32, 32]}}, "different values"),
        ({"seeds": [1, 1]}, "each one once"),
        ({"search": {"optim.lr": {"uniform": [0, 1]}}}, "needs `draws`"),
        ({"search": {"optim.lr": {"uniform": [1, 1]}}, "draws": 2}, "must be below"),
        ({"search": {"optim.lr": {"uniform": [0, 1], "choice": [1]}}, "draws": 2}, "exactly one"),
        ({"reference": {"train.global_batch": 48}}, "not on that axis"),
        ({"asha": {"grace": 640}}, "must be below samples"),
        ({"metric": "x"}, "there is metrics"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(base: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sweep(base, **settings)


def test_a_point_that_cannot_run_is_refused_before_the_first_trial(base: str) -> None:
    with pytest.raises(ConfigError, match=r"at train.global_batch = 48.*\n.*must be a multiple"):
        plan_trials(sweep(base, axes={"train.global_batch": [32, 48]}), [])
    with pytest.raises(ConfigError, match="warmup_steps = 20, and its 640 samples are 20 steps"):
        plan_trials(sweep(base, axes={"train.global_batch": [32]}), ["optim.warmup_steps=10"])
    with pytest.raises(ConfigError, match="seed: a sweep sets this itself, by its own `seeds`"):
        plan_trials(sweep(base, axes={"seed": [1, 2]}), [])
    with pytest.raises(ConfigError, match=r"train.samples: .* by its own `samples`"):
        plan_trials(sweep(base), ["train.samples=10"])
    for free in ({"workers.count": [1, 2]}, {"memory": {"little": {"train.micro_batch": 32}}}):
        with pytest.raises(ConfigError, match="so it cannot be varied"):
            plan_trials(sweep(base, axes=free), [])
    with pytest.raises(ConfigError, match="'cubic'"):
        plan_trials(sweep(base, axes={"lr_rule": ["cubic"]}), [])
    with pytest.raises(ConfigError, match="asha judges trials at their validations"):
        plan_trials(sweep(base, asha={"grace": 64}), [])


def test_what_a_set_with_one_caption_an_image_cannot_say_is_refused(base: str, tiny: Callable[..., Experiment]) -> None:
    data = tiny().data
    validation = Validation(val_reader(data, build_index(str(data.val), data.columns)), 64, None, True, None, 384)
    refuse_unmeasured(sweep(base, metrics=["mixed/own_image"]), validation)
    with pytest.raises(ConfigError, match="texts/own_r10 not measured"):
        refuse_unmeasured(sweep(base, metrics=["texts/own_r10"]), validation)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.stem}/{path.stem}")
def test_shipped_sweeps_are_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it compares is measured by all of its arms."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("NEV_DATA", "somewhere")
    shipped = parse(Sweep, read_yaml(path), where=str(path))
    trials = plan_trials(shipped, [])
    assert len(trials) > 1
    of_suite = load_suite(shipped.suite).tasks if shipped.suite else ()
    for trial in trials:
        zero_shot, retrieves = trial.experiment.eval.zero_shot, trial.experiment.eval.retrieval
        known = measure_names(1000 if zero_shot else 0, 5 if retrieves else 0) if zero_shot or retrieves else set()
        known |= {f"{task.name}/{metric}" for task in of_suite for metric in METRICS[task.kind]}
        assert set(shipped.metrics) <= known, dict(trial.arm)


@pytest.mark.ray
def test_as_many_at_a_time_as_leave_a_cpu_to_decode(ray_cluster: None, base: str) -> None:
    cpus = os.cpu_count() or 1

    def at_once(*overrides: str, **settings: object) -> int:
        wanted = sweep(base, **settings)
        return concurrent(wanted, plan_trials(wanted, list(overrides)))

    assert at_once() == min(cpus, 6)
    assert at_once("workers.cpus=1") == max(1, min(cpus - 1, 6))
    assert at_once("workers.count=2", "data.block_rows=16") == max(1, min(cpus // 2, 6))
    assert at_once(concurrent=1) == 1
    with pytest.raises(ConfigError, match="concurrent = 99: there is room for"):
        at_once(concurrent=99)
    wanted = sweep(base)
    trial = plan_trials(wanted, ["workers.threads=null"])[0].experiment
    assert with_threads(trial, 2).workers.threads == max(1, cpus // 2)


def test_what_trials_share_is_done_once(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six trials of one set and one text tower: one index of each set, one call for the captions, one tower."""
    calls: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **named: (calls.append(name), call(*given, **named))[1]

    monkeypatch.setattr("nev.sweep.run.embed_captions", counted("captions", lambda *given: None))
    for name in ("build_index", "load_text"):
        monkeypatch.setattr(f"nev.sweep.run.{name}", counted(name, getattr(nev.sweep.run, name)))
    trials = plan_trials(sweep(base), [])
    assert len(set(share(trials, Console(quiet=True)))) == 1
    assert sorted(calls) == ["build_index", "build_index", "captions", "load_text"]


def test_a_suite_without_its_data_is_refused_before_training(
    base: str, tmp_path: Path, tiny: Callable[..., Experiment]
) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump({**suite_of_colours(tmp_path / "colours"), "root": str(tmp_path)}))
    wanted = sweep(base, suite=str(suite), metrics=["colours/top1"])
    known = read_suite(wanted, tiny())
    assert known == read_suite(wanted, tiny()), "the same at every start"
    shutil.rmtree(tmp_path / "colours")
    with pytest.raises(ConfigError, match=r"cannot score colours: .*colours"):
        read_suite(wanted, tiny())
    other = read_suite(sweep(base, suite=str(suite)), tiny())
    assert other.digest != known.digest, "no metric needs it, and what was scored there counts no more"


def test_a_run_that_mlflow_lacks_hides_no_other(base: str, tmp_path: Path, tiny: Callable[..., Experiment]) -> None:
    uri, wanted = f"sqlite:///{tmp_path}/mlflow.db", sweep(base)
    parent = open_parent(wanted, "definition", tiny(), uri)
    child = open_run(uri, "nev", "trial", tiny(), {}, str(tmp_path))
    arm = (("train (batch)", "32"),)
    made = {"arm": arm, "metrics": {"zero_shot/top1": 0.5}, "samples": 640, "seconds": 1.0}
    lost = TrialResult(name="lost", seed=0, run_id="0" * 32, **made)
    kept = TrialResult(name="kept", seed=1, run_id=child.run_id, **made)
    said = publish(Outcome(wanted, [lost, kept], {}), parent, [])
    assert said.startswith("lost: ")
    assert "kept" not in said
    run = MlflowClient(tracking_uri=uri).get_run(child.run_id)
    assert run.data.metrics["zero_shot/top1"] == 0.5
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert run.data.tags["nev.arm.train _batch_"] == "32", "MLflow takes no brackets in a tag's name"
    assert open_parent(wanted, "definition", tiny(), uri).run_id == parent.run_id
    assert open_parent(wanted, "another", tiny(), uri).run_id != parent.run_id


def suite_of_colours(folder: Path) -> dict[str, Any]:
    """A suite of one task, whose pictures are written to `folder`."""
    for colour in ("red", "blue"):
        (folder / colour).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (32, 32), colour).save(folder / colour / f"{number}.png")
    source = {"format": "folder-classes", "input": "colours"}
    task = {"name": "colours", "kind": "zero_shot", "source": source, "templates": ["a {} picture"]}
    return {"about": "Two colours", "root": "${WHERE_COLOURS_LIE}", "tasks": [task]}


def runs_of(uri: str) -> tuple[list[Any], list[Any]]:
    """The parents and the children that MLflow has."""
    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("nev").experiment_id])
    parents = [run for run in runs if run.data.tags.get("nev.kind") == "sweep"]
    return parents, [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_arm_fails_and_one_is_ended_early_on_s3(
    s3: Proxy,
    ray_cluster: None,
    base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Two trials at a time on two CPUs, of which their workers reserve one. The wild arm makes room for the dull one, which
    comes to its rung after the good one. The suite's variable is set here alone, not in the cluster's processes.
    """
    monkeypatch.setenv("WHERE_COLOURS_LIE", str(tmp_path))
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump(suite_of_colours(tmp_path / "colours")))
    wild = {"optim.lr": 1e30, "optim.clip_norm": None}
    wanted = sweep(
        base,
        axes={"arm": {"good": {}, "wild": wild, "dull": {"optim.lr": 1e-9}}},
        overrides={"train.global_batch": 32, "train.eval_every": 10, "workers.cpus": 0.5, "guards.max_skipped": 0},
        seeds=[0],
        samples=640,
        metrics=["zero_shot/top1", "space/gap", "colours/top1"],
        suite=str(suite),
        concurrent=2,
        asha={"grace": 320, "reduction": 2},
    )
    places = ["output=s3://bucket/runs", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    done = run_sweep(wanted, places, Console(width=200))
    good, dull = done.outcome.results
    assert not done.outcome.whole
    assert not good.ended_early
    assert good.metrics.keys() >= {"zero_shot/top1_low", "space/gap", "mixed/own_image"}
    ((name, error),) = done.outcome.errors.items()
    assert name.startswith("sizes-arm_wild-seed_0-")
    assert "no finite loss" in error
    assert dull.ended_early
    assert dull.samples == 320
    printed = capfd.readouterr()
    assert "1 failed" in printed.out
    for chatter in ("run_trial", "Traceback", "tune.py", "─"):
        assert chatter not in printed.out + printed.err, chatter

    parents, children = runs_of(done.tracking_uri)
    assert len(parents) == 1
    assert sorted((run.data.tags.get("nev.arm.arm", ""), run.info.status) for run in children) == [
        ("dull", "KILLED"),
        ("good", "FINISHED"),
        ("wild", "FAILED"),
    ]
    held = [group["bundles"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
    assert not held, "room that is not given back"
    fs = filesystem("s3://bucket")[0]
    files = [path.rpartition("/")[2] for path in fs.find(parents[0].info.artifact_uri)]
    assert files == ["base.yaml", "sizes.json", "sizes.md", "sizes.png", "sizes.svg", "sizes.yaml"]
    assert read_sweep(done.tracking_uri, "sizes").results == done.outcome.results
    (place,) = [file for file in done.files if file.endswith(".md")]
    assert place.startswith("s3://bucket/runs/sizes-")
    said = fs.cat_file(place).decode()
    assert place.replace(".md", ".png") in done.files
    assert "**Failed** (1)" in said
    assert "**Ended early by ASHA** (1)" in said


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_sweep_loses_and_repeats_nothing(ray_cluster: None, base: str, tmp_path: Path) -> None:
    """SIGKILL to the driver when one trial is finished and the other has a checkpoint; the same command goes on."""
    settings = raw(base, axes={"vision.pool": ["mean"]}, concurrent=1, samples=64 * 40)
    file = tmp_path / "sizes.yaml"
    file.write_text(yaml.safe_dump(settings))
    wanted, overrides = parse(Sweep, settings), ["train.checkpoint_every=4"]
    runs = tmp_path / "runs"
    command = [sys.executable, str(ROOT / "pipelines/ablate.py"), "--config", str(file), "--set", *overrides]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 240
        while not (
            list(runs.glob("*-seed_0-*/result.json")) and list(runs.glob("*-seed_1-*/checkpoints/*/state.json"))
        ):
            assert driver.poll() is None, driver.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        driver.kill()
        driver.wait(30)
    (first,), (second,) = runs.glob("*-seed_0-*"), runs.glob("*-seed_1-*")
    assert int(str(latest(str(second)))[-8:]) < 40
    finished = (first / "result.json").stat().st_mtime_ns

    done = run_sweep(wanted, overrides, Console(quiet=True))
    assert done.outcome.whole
    assert (first / "result.json").stat().st_mtime_ns == finished, "what is finished is not done again"
    parents, children = runs_of(done.tracking_uri)
    assert len(parents) == 1
    assert [run.info.status for run in (*parents, *children)] == ["FINISHED"] * 3
    client = MlflowClient(tracking_uri=done.tracking_uri)
    for run in children:
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss")]
        assert steps == list(range(1, 41)), "no step is missing, and none is twice"
    again = run_sweep(wanted, overrides, Console(quiet=True))
    assert again.outcome.results == done.outcome.results
    assert len(runs_of(done.tracking_uri)[1]) == 2
    rows = json.loads(Path(next(name for name in done.files if name.endswith(".json"))).read_text())
    assert [row["name"] for row in rows] == [first.name, second.name]
    remembered = read_sweep(done.tracking_uri, "sizes")
    assert remembered.sweep == wanted
    assert remembered.results == done.outcome.results
    with pytest.raises(ConfigError, match="no sweep is called 'other'"):
        read_sweep(done.tracking_uri, "other")


def test_a_report_that_holds_no_number_ends_no_sweep() -> None:
    reported = {"zero_shot/top1": 0.5, "space/gap": float("nan"), "val/rows": float("inf"), "samples": 64, "pid": 7.0}
    assert numbers(reported) == {"zero_shot/top1": 0.5}
