"""What is wrong with a run is told before it begins, all of it at once."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nev.common.errors import ErrorCollector, NotReady
from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.paths import with_absolute_paths
from nev.data import index
from nev.models.text import TextTower, load_text
from nev.runs import checkpoint, manifest
from nev.runs.folder import check_output, check_space, run_folder
from nev.runs.manifest import list_checkpoints, verify
from nev.runs.metrics_log import save_mlflow_run_id
from nev.runs.tracking import local_artifacts, open_run, tracking_uri
from nev.storage.reading import DataError
from nev.train.capacity import checkpoint_bytes, weight_bytes
from nev.train.driver.preflight import prepare
from nev.train.driver.resources import check_disk
from nev.train.experiment import run_experiment

Make = Callable[..., Experiment]
Usage = namedtuple("Usage", "total used free")


def test_one_finding_is_itself_and_more_are_a_list() -> None:
    found = ErrorCollector()
    found.refuse()
    with found:
        raise DataError("no shards")
    with pytest.raises(DataError, match=r"^no shards$"):
        found.refuse()
    for message in ("no room", "no shards"):  # one of them is known already
        with found:
            raise ConfigError(message)
    with pytest.raises(NotReady, match=r"^2 things are in the way:\n  1\. no shards\n  2\. no room$"):
        found.refuse()


def test_a_bug_is_no_finding() -> None:
    with pytest.raises(ZeroDivisionError), ErrorCollector():
        1 / 0  # noqa: B018


def test_without_its_sets_a_run_names_all_that_is_wrong_and_starts_no_ray(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("connecting", "connect"):
        monkeypatch.setattr(f"nev.train.experiment.{name}", lambda: pytest.fail("Ray was started"))
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # though another test may have started one
    config = tiny(
        data__train=str(tmp_path / "nothing"),
        data__augment__auto="rand-x9",
        vision__trunk="vit_of_nobody",
        eval__best="top-2",
        tracking__uri="http://127.0.0.1:9",
        workers__gpus=99,
    )
    with pytest.raises(NotReady) as caught:
        run_experiment(config, Console(quiet=True))
    said = str(caught.value)
    assert said.startswith("6 things are in the way:")
    parts = (
        "nothing",
        "rand-x9",
        "vit_of_nobody",
        "'top-2' is not measured",
        "MLflow at http://127.0.0.1:9",
        "workers.gpus = 99",
    )
    for part in parts:
        assert part in said, part
    assert not list(Path(run_folder(with_absolute_paths(config))).glob("*")), "nothing is left behind"


def test_an_output_that_cannot_be_written(tmp_path: Path, tiny: Make) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output = .*file/runs.* cannot be used"):
        check_output(with_absolute_paths(tiny(output=str(tmp_path / "file" / "runs"))))
    config = with_absolute_paths(tiny())
    check_output(config)
    assert not Path(run_folder(config)).exists(), "a run that is refused leaves no folder"


def test_room_for_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "new"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 3 * 2**30))
    check_space(str(run), checkpoints=2, size=2**30)
    with pytest.raises(ConfigError, match=r"3\.0 GiB free, .* take 4\.0 GiB \(4 of 1\.00 GiB\).*keep_last"):
        check_space(str(run), checkpoints=3, size=2**30)
    held = run / "checkpoints" / "step-00000001" / "model.safetensors"
    held.parent.mkdir(parents=True)
    with held.open("wb") as file:
        file.truncate(2**30)
    check_space(str(run), checkpoints=3, size=2**30)


def test_room_for_mlflows_copy_of_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Make, text: TextTower
) -> None:
    """Artifacts of the default store lie on the run's disk; the copy that is there counts as room."""
    config = with_absolute_paths(tiny())
    one, weights = checkpoint_bytes(config, text), weight_bytes(config, text)
    saved = config.train.keep_last + 2  # the best one, and one more that is being written
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, saved * one + weights))
    check_disk(config, text, reachable=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, saved * one + weights - 1))
    with pytest.raises(ConfigError, match=r"and MLflow's copy of the weights"):
        check_disk(config, text, reachable=True)
    check_disk(config, text, reachable=False)

    tracker = open_run(tracking_uri(config.tracking, config.output), "nev", "tiny", config, {}, config.output)
    save_mlflow_run_id(run_folder(config), tracker.run_id)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/model.safetensors").write_bytes(bytes(weights))
    tracker.artifact(tmp_path / "copy", "checkpoint")
    check_disk(config, text, reachable=True)


def test_artifacts_elsewhere_take_no_room_here(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert local_artifacts(uri, "new", str(tmp_path / "a b"), None) == tmp_path / "a b/mlartifacts"
    assert local_artifacts(uri, "new", "s3://bucket/runs", None) is None
    MlflowClient(tracking_uri=uri).create_experiment("old", artifact_location="s3://bucket/artifacts")
    assert local_artifacts(uri, "old", str(tmp_path), None) is None


@pytest.mark.slow
def test_each_set_is_indexed_once(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []
    whole = index.list_entries

    def counted(fs: Any, path: str) -> dict[str, dict[str, Any]]:
        listed.append(Path(path).name)
        return whole(fs, path)

    monkeypatch.setattr(index, "list_entries", counted)
    prepared = prepare(tiny())
    assert sorted(listed) == ["train", "val"]
    assert prepared.reader.index.paths == prepared.job.shards
    assert (prepared.resume.step, prepared.damaged) == (0, [])


def test_a_run_that_goes_on_is_verified_once_and_its_damage_is_reported(
    tiny: Make, text: TextTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers.training import prepare_job, run_bare, train_reader

    config = with_absolute_paths(tiny(train__steps=4, train__checkpoint_every=2, eval={}, data__val=None))
    job = prepare_job(config, text)
    run_bare(job, train_reader(config, text))
    Path(job.run, "checkpoints/step-00000004/model.safetensors").write_bytes(b"cut")
    verified: list[str] = []

    def counted(location: str) -> dict[str, Any]:
        verified.append(location[-1])
        return verify(location)

    monkeypatch.setattr(manifest, "verify", counted)
    prepared = prepare(config)
    assert verified == ["4", "2"]
    assert prepared.resume.step == 2
    (damage,) = prepared.damaged
    assert "step-00000004/model.safetensors: damaged" in damage


@pytest.mark.slow
def test_mlflow_gets_the_weights_of_a_checkpoint_and_where_it_lies(tiny: Make, text: TextTower) -> None:
    from helpers.training import prepare_job, run_bare, train_reader
    from mlflow import MlflowClient

    job = prepare_job(tiny(train__steps=1), text)
    run_bare(job, train_reader(job.config, text))
    (location,) = list_checkpoints(job.run)
    tracker = open_run(
        tracking_uri(job.config.tracking, job.config.output), "nev", "tiny", job.config, {}, job.config.output
    )
    assert not tracker.artifacts([], location)
    client = MlflowClient(tracking_uri=tracker.uri)
    names = {Path(file.path).name for file in client.list_artifacts(tracker.run_id, "checkpoint")}
    assert names == {path.name for path in Path(location).iterdir()} - {"optimizer.safetensors", "rng.safetensors"}
    assert {"model.safetensors", "state.json"} <= names
    run = client.get_run(tracker.run_id)
    assert run.data.tags["nev.checkpoint"] == location
    copied = client.download_artifacts(tracker.run_id, "checkpoint")
    assert checkpoint.load_model(copied)[0] == checkpoint.load_model(location)[0]


@pytest.mark.slow
@pytest.mark.parametrize("lock", ["text", "none"])
def test_the_size_of_a_checkpoint_is_foretold(lock: str, tiny: Make, small_text: dict[str, object]) -> None:
    from helpers.training import prepare_job, run_bare, train_reader

    config = tiny(lock=lock, train__steps=1, **small_text)
    text = load_text(config.text)
    job = prepare_job(config, text)
    run_bare(job, train_reader(config, text))
    (location,) = list_checkpoints(job.run)
    real = sum(Path(location, f"{part}.safetensors").stat().st_size for part in ("model", "optimizer"))
    assert checkpoint_bytes(config, text) == pytest.approx(real, rel=0.05)
    weights = Path(location, "model.safetensors").stat().st_size
    assert weight_bytes(config, text) == pytest.approx(weights, rel=0.05)
