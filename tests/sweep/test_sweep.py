"""Ablations: from a file to trials, and what trials share."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.sweeps import sweep
from rich.console import Console

import nev.sweep.run
from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.file import parse, read_yaml
from nev.data.index import build_index
from nev.eval.suite.schema import METRICS, load_suite
from nev.eval.validation.scoring import list_metric_names
from nev.eval.validation.task import Validation, val_reader
from nev.storage.files import StorageError
from nev.sweep.config import Sweep
from nev.sweep.results import TrialResult
from nev.sweep.run import check_trials, count_concurrent, prepare_shared, refuse_unmeasured, with_threads
from nev.sweep.sweep_progress import SweepProgress, finite_metrics
from nev.sweep.trials import Trial, find_reference, name_trials, plan_trials

ROOT = Path(__file__).parents[2]
ABLATIONS = ROOT / "configs" / "ablations"
SHIPPED = sorted([*ABLATIONS.glob("*.yaml"), *(ABLATIONS / "paper").glob("*.yaml")])


def test_every_trial_sees_the_same_number_of_samples(base: str) -> None:
    trials = plan_trials(sweep(base), [])
    assert len(trials) == 6
    assert {trial.experiment.train.samples for trial in trials} == {640}
    assert {trial.experiment.train.steps for trial in trials} == {None}
    assert [(t.experiment.train.global_batch, t.experiment.seed) for t in trials[:3]] == [(32, 0), (32, 1), (64, 0)]
    assert len({trial.name for trial in name_trials(sweep(base), trials, [""] * 6)}) == 6


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
    assert dict(find_reference(wanted)) == {"lr_rule": "constant", "head": "mean"}
    other = sweep(base, axes=axes, reference={"head": "slow map"})
    assert dict(find_reference(other)) == {"lr_rule": "constant", "head": "slow map"}


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
        return {trial.name for trial in name_trials(wanted, trials, [data] * len(trials))}

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
        ({"seeds": [1, 1]}, "give each seed once"),
        ({"search": {"optim.lr": {"uniform": [0, 1]}}}, "needs `draws`"),
        ({"search": {"optim.lr": {"uniform": [1, 1]}}, "draws": 2}, "must be below"),
        ({"search": {"optim.lr": {"uniform": [0, 1], "choice": [1]}}, "draws": 2}, "exactly one"),
        ({"reference": {"train.global_batch": 48}}, "not on that axis"),
        ({"asha": {"grace": 640}}, "must be below samples"),
        ({"metric": "x"}, "did you mean metrics"),
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
    with pytest.raises(ConfigError, match="seed: the sweep sets this by `seeds`"):
        plan_trials(sweep(base, axes={"seed": [1, 2]}), [])
    with pytest.raises(ConfigError, match=r"train.samples: .* by `samples`"):
        plan_trials(sweep(base), ["train.samples=10"])
    for free in ({"workers.count": [1, 2]}, {"memory": {"little": {"train.micro_batch": 32}}}):
        with pytest.raises(ConfigError, match="so it cannot be varied"):
            plan_trials(sweep(base, axes=free), [])
    with pytest.raises(ConfigError, match="'cubic'"):
        plan_trials(sweep(base, axes={"lr_rule": ["cubic"]}), [])
    with pytest.raises(ConfigError, match="asha compares trials at their validations"):
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
        known = list_metric_names(1000 if zero_shot else 0, 5 if retrieves else 0) if zero_shot or retrieves else set()
        known |= {f"{task.name}/{metric}" for task in of_suite for metric in METRICS[task.kind]}
        assert set(shipped.metrics) <= known, dict(trial.arm)


@pytest.mark.ray
def test_as_many_at_a_time_as_leave_a_cpu_to_decode(ray_cluster: None, base: str) -> None:
    cpus = os.cpu_count() or 1

    def concurrent(*overrides: str, **settings: object) -> int:
        wanted = sweep(base, **settings)
        return count_concurrent(wanted, plan_trials(wanted, list(overrides)))

    assert concurrent() == min(cpus, 6)
    assert concurrent("workers.cpus=1") == max(1, min(cpus - 1, 6))
    assert concurrent("workers.count=2", "data.block_rows=16") == max(1, min(cpus // 2, 6))
    assert concurrent(concurrent=1) == 1
    with pytest.raises(ConfigError, match="concurrent = 99: there is room for"):
        concurrent(concurrent=99)
    wanted = sweep(base)
    trial = plan_trials(wanted, ["workers.threads=null"])[0].experiment
    assert with_threads(trial, 2).workers.threads == max(1, cpus // 2)


def test_what_trials_share_is_done_once(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six trials of three arms, one set and one text tower: the captions are embedded once, the tower is loaded once."""
    calls: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **named: (calls.append(name), call(*given, **named))[1]

    monkeypatch.setattr("nev.sweep.run.embed_captions", counted("captions", lambda *given: None))
    for name in ("build_index", "load_text"):
        monkeypatch.setattr(f"nev.sweep.run.{name}", counted(name, getattr(nev.sweep.run, name)))
    monkeypatch.setattr(
        "nev.sweep.run.check_inputs", lambda experiment, text: (text.width, SimpleNamespace(validation=None))[1]
    )
    monkeypatch.setattr("nev.sweep.run.refuse_unmeasured", lambda *given: None)
    asked = sweep(base)
    trials, load = plan_trials(asked, []), functools.cache(nev.sweep.run.load_text)
    assert len(set(prepare_shared(trials, Console(quiet=True), load))) == 1
    check_trials(asked, trials, load)
    assert sorted(calls) == ["build_index", "build_index", "captions", "load_text"]


def test_the_shares_of_a_mixture_are_part_of_a_trial(
    base: str, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nev.sweep.run.embed_captions", lambda *given: None)
    load = functools.cache(nev.sweep.run.load_text)
    hashes = []
    for weights in ((3, 1), (1, 3), (3, 1)):
        sets = [{"path": str(pictures / "train"), "weight": weight, "name": f"n{weight}"} for weight in weights]
        (trial, *_) = plan_trials(sweep(base), [f"data.train={json.dumps(sets)}"])
        hashes.append(prepare_shared([trial], Console(quiet=True), load)[0])
    assert hashes[0] == hashes[2] != hashes[1]


def test_a_report_that_holds_no_number_ends_no_sweep() -> None:
    reported = {"zero_shot/top1": 0.5, "space/gap": float("nan"), "val/rows": float("inf"), "samples": 64, "pid": 7.0}
    assert finite_metrics(reported) == {"zero_shot/top1": 0.5}


def test_storage_that_takes_no_result_ends_no_sweep(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ASHA ends a trial early, and the trial's folder cannot be written: that trial has failed, and the sweep continues."""
    wanted = sweep(base, asha={"grace": 64, "reduction": 2}, overrides={"train.eval_every": 1})
    trials = plan_trials(wanted, [])

    def refuse(trial: Trial, result: TrialResult) -> None:
        raise StorageError("s3://bucket/result.json cannot be written:\n503 Slow Down")

    monkeypatch.setattr("nev.sweep.sweep_progress.save_result", refuse)
    shown: list[str] = []
    follower = SweepProgress(wanted, trials, len(trials), lambda what, done, total, text: shown.append(text))
    ended = SimpleNamespace(config={"number": 1}, last_result={"samples": 64, "zero_shot/top1": 0.5})
    follower.on_trial_start(0, [], ended)
    follower.on_trial_complete(0, [], ended)
    (name,) = follower.errors
    assert name == trials[1].name
    assert (
        "could not be saved: StorageError: s3://bucket/result.json cannot be written: 503 Slow Down"
        in follower.errors[name]
    )
    assert shown[-1].startswith("0 running, 1 failed")
