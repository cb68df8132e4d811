"""A run whose output is on S3, over HTTP: what it writes is what a folder would hold, and what cannot work is told first."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers.checkpoints import load_checkpoint
from helpers.s3_server import Proxy, mixed_faults
from helpers.tiny import REFERENCE
from mlflow import MlflowClient
from rich.console import Console
from torch import Tensor

from nev.cluster.ray_internals import first_cause
from nev.common.errors import NevError
from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.data.block import Block
from nev.eval.evaluate import evaluate_checkpoint
from nev.runs import checkpoint, manifest
from nev.runs.folder import check_output, run_folder
from nev.runs.metrics_log import read_points
from nev.runs.tracking import Tracker, open_run
from nev.storage import s3 as s3_module
from nev.storage.files import StorageError, filesystem, upload
from nev.train.core.state_dict import gather_tensors
from nev.train.experiment import Summary, run_experiment
from nev.train.worker.quarantine import Quarantine

Make = Callable[..., Experiment]
RUN = "s3://bucket/runs/first"
PATH = RUN.removeprefix("s3://")


def another_process() -> Any:
    """A filesystem that shares nothing with this process's own."""
    return s3_module._filesystem.__wrapped__(0)


def trained() -> tuple[torch.nn.Linear, torch.optim.AdamW, dict[str, Tensor]]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer, {"torch": torch.get_rng_state()}


def state(step: int, score: float) -> manifest.CheckpointState:
    return manifest.CheckpointState(step, {}, {"plan": "p"}, {"score": score}, world_size=1, bad_rows=0, history={})


def step_folder(step: int) -> str:
    return f"{RUN}/checkpoints/step-{step:08d}"


def bad_row(uid: str) -> Block:
    place = {name: np.zeros(2, np.int32) for name in ("shard", "row_group", "row")}
    reasons = np.array(["", "image is null"], object)
    return {"valid": np.array([True, False]), "uid": np.array(["good", uid], object), "reason": reasons, **place}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["500", "503"])
def test_checkpoints_are_kept_as_in_a_folder(fault: str, s3: Proxy, impatient: None) -> None:
    s3.rule = lambda method, path, span, before: fault if before == 0 else None
    model, optimizer, rng = trained()
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.5), (3, 0.4), (4, 0.2)):  # step 3 is reached twice
        saved = checkpoint.save(RUN, state(step, score), gather_tensors(model, optimizer), rng, {"more.bin": b"beside"})
        assert saved == manifest.latest_checkpoint(RUN) == step_folder(step)
    assert manifest.best_checkpoint(RUN, "score") == step_folder(2)
    manifest.prune_checkpoints(RUN, keep_last=1, keep_best="score")
    assert manifest.list_checkpoints(RUN) == [step_folder(2), step_folder(4)]
    assert len(filesystem(RUN)[0].find(PATH)) == 2 * 5, "what was pruned is gone"
    found, weights, moments, states = load_checkpoint(step_folder(4))
    assert found == state(4, 0.2)
    assert torch.equal(weights["weight"], model.weight)
    assert torch.equal(moments["weight/exp_avg"], optimizer.state[model.weight]["exp_avg"])
    assert torch.equal(states["torch"], rng["torch"])
    assert s3.broken[fault] > 20


def test_a_checkpoint_is_there_with_its_last_request(s3: Proxy, impatient: None) -> None:
    model, optimizer, rng = trained()
    checkpoint.save(RUN, state(1, 0.5), gather_tensors(model, optimizer), rng)
    puts = [path.rsplit("/", 1)[1] for method, path in s3.seen if method == "PUT"]
    assert sorted(puts[:-1]) == ["model.safetensors", "optimizer.safetensors", "rng.safetensors"]
    assert puts[-1] == "state.json", "the manifest comes last, and nothing is renamed, which S3 cannot do in one piece"

    s3.rule = lambda method, path, span, before: "403" if (method, path[-5:]) == ("PUT", ".json") else None
    with pytest.raises(StorageError, match=r"00002/state\.json cannot be written .*AWS_PROFILE"):
        checkpoint.save(RUN, state(2, 0.5), gather_tensors(model, optimizer), rng)
    s3.reset()
    assert manifest.list_checkpoints(RUN) == [step_folder(1)]
    assert checkpoint.save(RUN, state(2, 0.5), gather_tensors(model, optimizer), rng) == manifest.latest_checkpoint(RUN)


def test_what_another_process_writes_and_removes_is_seen(s3: Proxy, impatient: None) -> None:
    model, optimizer, rng = trained()
    checkpoint.save(RUN, state(1, 0.5), gather_tensors(model, optimizer), rng)
    assert manifest.list_checkpoints(RUN) == [step_folder(1)]
    other, path = another_process(), f"{PATH}/checkpoints/step-00000002"
    assert other is not filesystem(RUN)[0]
    other.pipe_file(f"{path}/state.json", other.cat_file(f"{PATH}/checkpoints/step-00000001/state.json"))
    assert manifest.list_checkpoints(RUN) == [step_folder(1), step_folder(2)]
    assert filesystem(RUN)[0].exists(f"{path}/state.json")
    other.rm_file(f"{path}/state.json")
    assert manifest.list_checkpoints(RUN) == [step_folder(1)]
    assert not filesystem(RUN)[0].exists(f"{path}/state.json")


def test_a_failure_for_good_names_the_object_and_what_to_do(s3: Proxy, impatient: None) -> None:
    model, optimizer, rng = trained()
    checkpoint.save(RUN, state(1, 0.5), gather_tensors(model, optimizer), rng)
    attempts: dict[str, tuple[str, Callable[[], object]]] = {
        r"00002/model\.safetensors cannot be written": (
            "PUT",
            lambda: checkpoint.save(RUN, state(2, 0.5), gather_tensors(model, optimizer), rng),
        ),
        "checkpoints cannot be listed": ("GET", lambda: manifest.latest_checkpoint(RUN)),
        "step-00000001 cannot be removed": ("DELETE", lambda: manifest.remove_checkpoint(step_folder(1))),
        "quarantine cannot be listed": ("GET", lambda: Quarantine(RUN, ("a.parquet",), rank=0, first_step=0)),
    }
    for words, (refused, attempt) in attempts.items():
        s3.rule = lambda method, path, span, before, refused=refused: "403" if method == refused else None
        with pytest.raises(StorageError, match=rf"s3://bucket/runs/first/.*{words} .*AWS_PROFILE"):
            attempt()
    s3.rule = lambda method, path, span, before: "500" if path.endswith("/model.safetensors") else None
    with pytest.raises(manifest.CheckpointError, match=r"00001/model\.safetensors: cannot be read .*AWS_ENDPOINT_URL"):
        load_checkpoint(step_folder(1))


@pytest.mark.parametrize("fault", ["500", "503"])
def test_quarantine_is_written_and_taken_up(fault: str, s3: Proxy, impatient: None) -> None:
    s3.rule = lambda method, path, span, before: fault if before == 0 else None
    for rank in range(2):
        quarantine = Quarantine(RUN, ("a.parquet",), rank, first_step=0)
        for step in (7, 9):
            quarantine.note(step, bad_row(f"v{rank}"))
            quarantine.flush(step + 1)
    with filesystem(RUN)[0].open(f"{PATH}/quarantine/step-00000008-rank-1.parquet") as file:
        place = {"shard": "a.parquet", "row_group": 0, "row": 0}
        assert pq.read_table(file).to_pylist() == [{"step": 7, "uid": "v1", **place, "reason": "image is null"}]
    resumed = Quarantine(RUN, ("a.parquet",), rank=0, first_step=8)
    assert resumed.by_reason == {"image is null": 2}
    left = filesystem(RUN)[0].find(f"{PATH}/quarantine")
    assert [path.rsplit("/", 1)[1] for path in left] == [f"step-00000008-rank-{rank}.parquet" for rank in range(2)]
    another_process().cp_file(left[0], left[0].replace("rank-0", "rank-5"))
    assert Quarantine(RUN, ("a.parquet",), rank=0, first_step=8).by_reason == {"image is null": 3}
    assert s3.broken[fault] > 8


@pytest.mark.slow
def test_an_output_that_cannot_be_used_is_told_before_any_work(
    s3: Proxy, impatient: None, tiny: Make, tmp_path: Path
) -> None:
    store = {"tracking__uri": f"sqlite:///{tmp_path}/mlflow.db"}
    with pytest.raises(ConfigError, match=r"'s3://absent/runs' cannot be used: .*aws s3 mb s3://absent"):
        run_experiment(tiny(output="s3://absent/runs", **store), Console(quiet=True))
    with pytest.raises(ConfigError, match=r"'s3://bucket/runs' needs tracking\.uri: .*sqlite:////FOLDER/mlflow\.db"):
        check_output(tiny(output="s3://bucket/runs"))
    for refused in ("PUT", "GET", "DELETE"):
        s3.rule = lambda method, path, span, before, refused=refused: "403" if method == refused else None
        with pytest.raises(ConfigError, match=r"'s3://bucket/runs' .*s3:PutObject.*s3:ListBucket.*AWS_PROFILE"):
            check_output(tiny(output="s3://bucket/runs", **store))


def test_the_probe_costs_three_requests_and_leaves_nothing(s3: Proxy, tiny: Make) -> None:
    check_output(tiny(output="s3://bucket/runs", tracking__uri="http://127.0.0.1:9"))
    assert [method for method, _ in s3.seen] == ["PUT", "GET", "DELETE"]
    assert sum(s3.seen.values()) == 3
    assert filesystem(RUN)[0].find("bucket") == []


def test_the_probe_leaves_a_local_output_as_it_was(tiny: Make, tmp_path: Path) -> None:
    config = tiny(output=str(tmp_path / "runs"))
    check_output(config)
    assert not Path(run_folder(config)).exists()
    (Path(run_folder(config)) / "checkpoints").mkdir(parents=True)
    check_output(config)
    assert [entry.name for entry in Path(run_folder(config)).iterdir()] == ["checkpoints"]


def test_artifacts_on_s3_need_no_boto3(s3: Proxy, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    config = tiny(output="s3://bucket/runs")
    tracker = open_run(f"sqlite:///{tmp_path}/mlflow.db", "nev", "first", config, {}, config.output)
    (tmp_path / "note.txt").write_text("hello")
    tracker.artifact(tmp_path / "note.txt")
    fs = filesystem(RUN)[0]
    fs.pipe_file(f"{PATH}/checkpoints/step-00000001/state.json", b"{}")
    tracker.artifact(step_folder(1), "checkpoint")
    root = MlflowClient(tracking_uri=tracker.uri).get_run(tracker.run_id).info.artifact_uri
    assert root.startswith("s3://bucket/runs/mlartifacts/")
    root = root.removeprefix("s3://")
    assert fs.find(root) == [f"{root}/checkpoint/state.json", f"{root}/note.txt"]
    assert fs.cat_file(f"{root}/note.txt") == b"hello"


def test_the_first_cause_is_nevs_own_words() -> None:
    try:
        try:
            raise OSError("timed out")
        except OSError as error:
            raise StorageError("s3://bucket/a cannot be written") from error
    except NevError as error:
        outer = RuntimeError("Ray's frames")
        outer.__cause__ = error
    assert first_cause(outer) == "StorageError: s3://bucket/a cannot be written"


def test_the_first_cause_of_an_error_in_a_task_of_a_task() -> None:
    said = (
        "\x1b[36mray::SplitCoordinator.get()\x1b[39m\n  File 'x.py', line 1, in f\n"
        "ray.exceptions.RayTaskError(UserCodeException): \x1b[36mray::MapBatches(read_window)()\x1b[39m\n"
        "    raise ImportError(\nImportError: torch cannot be imported again\n\n"
        "The above exception was the direct cause of the following exception:\n\n"
        "ray.exceptions.UserCodeException: UDF failed to process a data block.\nTo change retry attempts, configure `ray`."
    )
    assert first_cause(RuntimeError(said)) == "ImportError: torch cannot be imported again"
    assert first_cause(RuntimeError("no more\nthan this")) == "RuntimeError: than this"


def test_a_full_memory_is_told_in_our_words() -> None:
    said = (
        "Task was killed.\nRefer to the documentation on how to address the out of memory issue: https://docs.ray.io/x"
    )
    assert first_cause(RuntimeError(said)).startswith(
        "a process of this run was killed because the memory of its machine was full"
    )


def weights(summary: Summary, step: int) -> dict[str, Tensor]:
    return checkpoint.load_model(f"{summary.checkpoint.rsplit('/', 1)[0]}/step-{step:08d}")[1]


def exact(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics that float noise in the vectors does not move. A fitted temperature is known to 1e-3."""
    return {name: value for name, value in metrics.items() if "fitted" not in name and "calibration" not in name}


def read_scores(run: str) -> dict[int, float]:
    points = read_points(run, 30)
    return {point.step: point.metrics["zero_shot/top1"] for point in points if "zero_shot/top1" in point.metrics}


def curve(summary: Summary) -> tuple[list[int], list[float]]:
    return Tracker(summary.tracking_uri, summary.mlflow_run_id).history("loss")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_on_s3_equals_one_in_a_folder(
    s3: Proxy, reference_run: Summary, tiny: Make, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data, its checkpoints and its pictures are on S3, and it validates beside its training: the scores and the choice
    of a run that validates in its loop. `tests/faults` stops such a run and resumes it.
    """
    monkeypatch.chdir(tmp_path)  # where a folder named "s3:" would come up
    upload(pictures, "s3://bucket/set")
    s3.rule = mixed_faults(seed=1)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    places = {"data__train": "s3://bucket/set/train", "data__val": "s3://bucket/set/val"}
    classes = {"eval__zero_shot__classes": "s3://bucket/set/classes.txt"}
    beside = {"eval__asynchronous": True, **REFERENCE}
    config = tiny(name="first", output="s3://bucket/runs", tracking__uri=store, **places, **classes, **beside)
    remote = run_experiment(config, Console(quiet=True))
    assert {"500", "503", "drop", "cut", "trickle"} <= s3.broken.keys()
    s3.reset()

    assert curve(remote) == curve(reference_run)
    left, right = weights(reference_run, 30), weights(remote, 30)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert exact(remote.metrics) == pytest.approx(exact(reference_run.metrics), abs=1e-5)
    assert remote.metrics == pytest.approx(reference_run.metrics, rel=0.05, abs=0.02)
    assert remote.checkpoint.rsplit("/", 1)[1] == reference_run.checkpoint.rsplit("/", 1)[1]
    in_loop, scores = map(read_scores, (reference_run.checkpoint.rsplit("/checkpoints/", 1)[0], RUN))
    assert scores == pytest.approx(in_loop, abs=1e-5)
    assert set(in_loop) == {10, 20, 30}
    for location in manifest.list_checkpoints(RUN):
        assert manifest.read_manifest(location)["metrics"] == {}  # not in the loop
    history = MlflowClient(tracking_uri=store).get_metric_history(remote.mlflow_run_id, "zero_shot/top1")
    assert sorted(point.step for point in history) == [10, 20, 30]
    fs = filesystem(RUN)[0]
    for picture in remote.pictures:
        assert fs.cat_file(picture).startswith(b"\x89PNG")
    assert fs.cat_file(str(remote.report)).startswith(b"<!doctype html>")
    names = {path.removeprefix(f"{PATH}/").split("/")[0] for path in fs.find(PATH)}
    assert names == {
        "checkpoints",
        "metrics",
        "mlflow.json",
        "loss.png",
        "retrieval.png",
        "classes.png",
        "config.yaml",
        "evaluation",
    }
    kept = [path for path in fs.find("bucket/runs/mlartifacts") if path.endswith("/artifacts/checkpoint/state.json")]
    assert len(kept) == 1
    assert not (tmp_path / "s3:").exists()

    _, metrics, files = evaluate_checkpoint(remote.checkpoint, [], Console(quiet=True))
    assert {name: metrics[name] for name in remote.metrics} == pytest.approx(remote.metrics)
    for name in (name.removesuffix("_low") for name in metrics if name.endswith("_low")):
        assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"], name
    assert {"zero_shot/top1_low", "space/gap", "mixed/images_found"} <= metrics.keys()
    assert files == [f"{RUN}/evaluation/validation-{remote.checkpoint[-8:]}.{kind}" for kind in ("html", "json")]
    assert all(fs.exists(file) for file in files)

    # As if the driver had died before it came to the last one: the next start scores it, and trains nothing.
    file = f"{step_folder(30)}/validation.json"
    before = json.loads(fs.cat_file(file))
    fs.rm_file(file)
    again = run_experiment(config, Console(quiet=True))
    assert exact(again.metrics) == pytest.approx(exact(remote.metrics), abs=1e-5)
    assert exact(json.loads(fs.cat_file(file))) == pytest.approx(exact(before), abs=1e-5)
