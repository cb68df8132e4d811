"""`train.profile`: traces of chosen steps in the run's folder and in MLflow, outside of the timed steps."""

from __future__ import annotations

import filecmp
import gzip
import io
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.training import CPU, Reports, blocks, load_train_state, prepare_job, train_reader
from mlflow import MlflowClient
from rich.console import Console

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.models.precision import choose_precision
from nev.models.text import TextTower
from nev.train.driver.metrics import MetricsLogger
from nev.train.experiment import Summary
from nev.train.worker import profiler
from nev.train.worker.loop import train
from nev.train.worker.state import RankContext

Make = Callable[..., Experiment]
QUICK: dict[str, Any] = {"eval__zero_shot": None, "eval__retrieval": False, "eval__best": None, "data__val": None}


def run_rank(config: Experiment, text: TextTower, stop_after: int | None = None) -> Reports:
    """Train one rank in this process from where the run stands."""
    job, reports = prepare_job(config, text, stop_after), Reports()
    ctx = RankContext(0, 1, CPU, choose_precision("fp32", CPU))
    train_state, start = load_train_state(job, ctx)
    stream = blocks(train_reader(config, text), job.plan, start.step, job.stop_step)
    train(job, ctx, train_state, start, stream, reports)
    return reports


def traced_steps(location: str) -> list[str]:
    """The names of the steps in a trace, in order."""
    events = json.loads(gzip.decompress(Path(location).read_bytes()))["traceEvents"]
    assert any(event["name"] == "aten::addmm" for event in events if "name" in event)
    marks = [event for event in events if str(event.get("name", "")).startswith("step ") and event.get("ph") == "X"]
    return list(dict.fromkeys(event["name"] for event in sorted(marks, key=lambda event: float(event["ts"]))))


@pytest.mark.slow
def test_consecutive_steps_share_a_trace_and_a_resumed_run_traces_only_what_it_trains(
    tiny: Make, text: TextTower
) -> None:
    config = tiny(**QUICK, train__steps=8, train__profile={"steps": [2, 3, 5, 6, 8]})
    folder = Path(config.output, config.name, "profile")
    first = run_rank(config, text, stop_after=5)
    assert first.traces == {step: str(folder / f"step-{step:08d}.json.gz") for step in (2, 5)}
    assert traced_steps(first.traces[2]) == ["step 2", "step 3"]
    assert traced_steps(first.traces[5]) == ["step 5"], "the trace is written where the run stops"
    second = run_rank(config, text)
    assert sorted(second.traces) == [6, 8]
    assert traced_steps(second.traces[8]) == ["step 8"]
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08d}.json.gz" for step in (2, 5, 6, 8)]
    assert not first.notes + second.notes


@pytest.mark.slow
def test_a_profiled_run_trains_as_an_unprofiled_one_and_its_rate_leaves_the_profiler_out(
    tiny: Make, text: TextTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]  # the clock of the meters moves in the profiler alone

    def slowly(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            now[0] += 1000
            return method(*args, **kwargs)

        return call

    for name in ("begin", "end"):
        monkeypatch.setattr(profiler.StepProfiler, name, slowly(getattr(profiler.StepProfiler, name)))
    monkeypatch.setattr("nev.train.worker.meters.time.perf_counter", lambda: now[0])
    plain = run_rank(tiny(**QUICK, name="plain", train__steps=3), text)
    profiled = run_rank(tiny(**QUICK, name="profiled", train__steps=3, train__profile={"steps": [2]}), text)
    assert now[0] == 2000
    assert profiled.traces
    for step in (1, 2, 3):
        assert profiled.metrics[step]["loss"] == plain.metrics[step]["loss"]
        assert profiled.metrics[step]["images_per_s"] > 1e9


def test_without_a_profile_and_on_other_ranks_no_step_is_profiled(tiny: Make, text: TextTower) -> None:
    precision = choose_precision("fp32", CPU)
    job = prepare_job(tiny(**QUICK), text)
    with profiler.StepProfiler(job, RankContext(0, 1, CPU, precision), Reports()) as unset:
        assert not any(unset.profiles(step) for step in range(30))
    job = prepare_job(tiny(**QUICK, train__profile={"steps": [2]}), text)
    with profiler.StepProfiler(job, RankContext(1, 2, CPU, precision), Reports()) as other:
        assert not other.profiles(2)


@pytest.mark.slow
def test_a_trace_that_cannot_be_written_costs_a_note(tiny: Make, text: TextTower) -> None:
    config = tiny(**QUICK, train__steps=2, train__profile={"steps": [1]})
    run = Path(config.output, config.name)
    run.mkdir(parents=True)
    (run / "profile").write_text("in the way")
    reports = run_rank(config, text)
    assert not reports.traces
    assert len(reports.notes) == 1
    assert "step 1: the trace of the profiler is lost" in reports.notes[0]
    assert sorted(reports.metrics) == [1, 2]


def test_an_error_inside_a_profiled_step_stops_the_profiler(tiny: Make, text: TextTower) -> None:
    job = prepare_job(tiny(**QUICK, train__profile={"steps": [1]}), text)
    ctx = RankContext(0, 1, CPU, choose_precision("fp32", CPU))
    for _ in range(2):  # a profiler that still ran would refuse to start
        with suppress(ZeroDivisionError), profiler.StepProfiler(job, ctx, Reports()) as started:
            started.begin(1)
            raise ZeroDivisionError


@pytest.mark.parametrize(
    ("steps", "message"),
    [([], "at least 1 item"), ([3, 2], "must ascend"), ([2, 2], "must ascend"), ([0], "greater than 0")],
)
def test_steps_that_are_no_ascending_numbers_are_refused(tiny: Make, steps: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(train__profile={"steps": steps})


def test_a_step_behind_the_end_is_refused_before_anything_starts(tiny: Make, text: TextTower) -> None:
    with pytest.raises(ConfigError, match=r"has step 21, and the run ends with step 20"):
        prepare_job(tiny(train__profile={"steps": [2, 21]}), text)
    epoch = tiny(train__steps=None, train__epochs=1, train__profile={"steps": [17]})  # 1,024 pictures, 64 a step
    with pytest.raises(ConfigError, match=r"has step 17, and the run ends with step 16"):
        prepare_job(epoch, text)


def test_an_mlflow_that_refuses_a_trace_is_named_and_training_goes_on() -> None:
    shown = io.StringIO()

    def refuse(location: str, folder: str) -> None:
        raise ValueError("no bucket")

    tracker: Any = SimpleNamespace(uri="http://mlflow", artifact=refuse)
    MetricsLogger(tracker, Console(file=shown, width=200)).save_trace(3, "runs/x/profile/step-00000003.json.gz")
    assert shown.getvalue().splitlines() == [
        "step 3: a trace of the profiler is in runs/x/profile/step-00000003.json.gz",
        "MLflow at http://mlflow has not taken the trace (no bucket)",
    ]


@pytest.mark.ray
@pytest.mark.slow
def test_a_trace_is_an_artifact_of_the_mlflow_run(reference_run: Summary) -> None:
    client = MlflowClient(reference_run.tracking_uri)
    listed = [each.path for each in client.list_artifacts(reference_run.mlflow_run_id, "profile")]
    assert listed == ["profile/step-00000002.json.gz"]
    (trace,) = Path(reference_run.checkpoint).parents[1].glob("profile/*")
    assert traced_steps(str(trace)) == ["step 2"]
    assert filecmp.cmp(trace, client.download_artifacts(reference_run.mlflow_run_id, listed[0]), shallow=False)
