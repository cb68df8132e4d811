"""Files from strangers, and secrets of our own: what docs/security.md promises and no other test shows."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.checkpoints import load_checkpoint
from rich.console import Console

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.embed.embedder import Embedder
from nev.eval import evaluate_suite as suites
from nev.eval.evaluate import evaluate_checkpoint
from nev.eval.suite.results import SuiteResult
from nev.models.text import TextTower
from nev.runs import checkpoint, manifest
from nev.runs.manifest import CheckpointState, Damaged
from nev.runs.metrics_log import save_mlflow_run_id
from nev.train.core.state_dict import gather_tensors
from nev.train.driver.metrics import open_tracking

if TYPE_CHECKING:
    from helpers.s3_server import Proxy

Make = Callable[..., Experiment]
SECRET = "s3cr3t-of-this-test"


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def saved(run: Path, config: dict[str, Any] | None = None) -> Path:
    """A good checkpoint."""
    model = torch.nn.Linear(2, 2)
    state = CheckpointState(1, config or {}, {"text": "x"}, {}, world_size=1, bad_rows=0, history={})
    return Path(checkpoint.save(str(run), state, gather_tensors(model, torch.optim.AdamW(model.parameters())), {}))


@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.safetensors", "rng.safetensors"])
def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path: Path, part: str) -> None:
    proof = tmp_path / "executed"
    location = saved(tmp_path / "run")
    torch.save({"weight": Trap(proof)}, location / part)
    stated = json.loads((location / "state.json").read_text())
    stated["sha256"][part] = hashlib.sha256((location / part).read_bytes()).hexdigest()  # whoever wrote it did it well
    (location / "state.json").write_text(json.dumps(stated))
    with pytest.raises(Damaged, match=rf"{part}: damaged"):
        load_checkpoint(str(location))
    assert not proof.exists()


def test_a_manifest_names_no_file_outside_its_folder(tmp_path: Path) -> None:
    location = saved(tmp_path / "run")
    outside = tmp_path / "outside"
    outside.write_text("mine")
    stated = json.loads((location / "state.json").read_text())
    stated["sha256"]["../../../outside"] = hashlib.sha256(outside.read_bytes()).hexdigest()
    (location / "state.json").write_text(json.dumps(stated))
    with pytest.raises(Damaged, match=r"names '\.\./\.\./\.\./outside', which is no file of a checkpoint"):
        manifest.verify(str(location))


def test_a_checkpoint_does_not_decide_that_code_from_the_hub_runs(
    tmp_path: Path, tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(text={"trust_remote_code": True, "encoder": "somebody/with-code"}).model_dump(mode="json")
    location = str(saved(tmp_path / "run", config))
    asked = []

    def load(text: Any) -> None:
        asked.append(text.trust_remote_code)
        raise ConfigError("far enough")

    monkeypatch.setattr("nev.runs.towers.load_text", load)
    with pytest.raises(ConfigError, match="far enough"):
        evaluate_checkpoint(location, [], Console(quiet=True))
    with pytest.raises(ConfigError, match="far enough"):
        evaluate_checkpoint(location, ["text.trust_remote_code=true"], Console(quiet=True))
    assert asked == [False, True]


@pytest.mark.parametrize("key", ["output", "data__train", "data__val", "tracking__uri"])
def test_a_password_in_a_location_is_refused_and_not_repeated(key: str, tiny: Make) -> None:
    with pytest.raises(ConfigError, match="leave the password out") as caught:
        tiny(**{key: f"s3://KEY:{SECRET}@bucket/prefix"})
    assert SECRET not in str(caught.value)


@pytest.mark.slow
def test_secrets_of_the_environment_are_written_nowhere(
    tiny: Make, text: TextTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers.training import prepare_job, run_bare, train_reader

    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "PGPASSWORD", "HF_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    config = tiny(train__steps=2)
    job = prepare_job(config, text)
    said = Console(file=io.StringIO())
    with open_tracking(job, {}, 0, said) as tracked:
        for step, metrics in run_bare(job, train_reader(config, text)).items():
            tracked.tracker.log(step, metrics)
    assert not said.file.getvalue(), "MLflow has everything"  # type: ignore[attr-defined]
    files = [path for path in Path(config.output).rglob("*") if path.is_file()]
    assert {"state.json", "model.safetensors", "mlflow.db", "mlflow.json"} <= {path.name for path in files}
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
    with sqlite3.connect(Path(config.output, "mlflow.db")) as store:
        assert SECRET not in "\n".join(store.iterdump())


def test_keys_with_odd_characters_are_taken_as_they_are(s3: Proxy) -> None:
    run = "s3://bucket/a b+c%41=&;'ü/{run}"
    model = torch.nn.Linear(2, 2)
    tensors = gather_tensors(model, torch.optim.AdamW(model.parameters()))
    state = CheckpointState(1, {}, {}, {}, world_size=1, bad_rows=0, history={})
    location = checkpoint.save(run, state, tensors, {})
    assert location.startswith(run)
    assert manifest.list_checkpoints(run) == [location]
    assert manifest.verify(location)["step"] == 1
    assert torch.equal(load_checkpoint(location)[1]["weight"], model.weight)
    manifest.remove_checkpoint(location)
    assert manifest.list_checkpoints(run) == []


@pytest.mark.slow
def test_a_checkpoint_does_not_decide_where_results_go(
    tmp_path: Path, tiny: Make, text: TextTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither to a server that it names, which would get the user's password, nor to a folder that a database beside it names."""
    from mlflow import MlflowClient

    page = tmp_path / "page.html"
    page.write_text("page")
    result = SuiteResult(suite="s", about="", checkpoint="", model="m", step=1, average=None, seconds=0, tasks=())
    run = tmp_path / "theirs/run"

    def evaluated(uri: str | None, run_id: str) -> str:
        location = saved(run, tiny(tracking__uri=uri).model_dump(mode="json"))
        save_mlflow_run_id(str(run), run_id)
        opened = Embedder(str(location), {}, tiny(tracking__uri=uri), text)
        console = Console(file=io.StringIO(), width=400)
        suites.track(result, opened, [str(page)], console)
        return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert "set MLFLOW_TRACKING_URI to the same to allow it" in evaluated(uri, "0" * 32)
        with pytest.raises(TimeoutError):
            server.accept()

    elsewhere = tmp_path / "elsewhere"
    store = f"sqlite:///{tmp_path}/theirs/mlflow.db"
    client = MlflowClient(tracking_uri=store)
    bad = client.create_run(client.create_experiment("bad", artifact_location=elsewhere.as_uri())).info.run_id
    good = client.create_run(
        client.create_experiment("good", artifact_location=(tmp_path / "theirs/files").as_uri())
    ).info.run_id
    assert "keeps files elsewhere" in evaluated(None, bad)
    assert not elsewhere.exists()
    assert evaluated(None, good) == ""
    assert [file.path for file in client.list_artifacts(good, "evaluation")] == ["evaluation/page.html"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert evaluated(None, bad) == ""
