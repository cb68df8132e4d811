"""The format `mlflow`: exported by the command, registered, loaded without nev and torch, and served over HTTP."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import numpy as np
import pandas as pd
import pytest
from helpers.models import SIZE, WIDTH, make_experiment, write_checkpoint
from helpers.pictures import encoded, photo
from helpers.processes import run_python
from mlflow.exceptions import MlflowException
from PIL import Image
from typer.testing import CliRunner

import nev
from nev.commands.main import app
from nev.config.model_spec import ModelError
from nev.export.registry import check_register, register
from nev.inference.model import Model

pytestmark = pytest.mark.slow

BLOCKED = ["nev", "torch", "timm", "transformers", "sentence_transformers", "simplejpeg", "onnx", "onnxscript"]
PICTURES = [encoded(photo(1, 60, 91), "PNG"), encoded(photo(2, 80, 50), quality=95)]
TEXTS = ["a photo of a dog", "../../etc/passwd", "http://127.0.0.1:9/photo.jpg", ""]


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


class Case(NamedTuple):
    """A model, its export, and the registry that has it."""

    model: Model
    folder: Path
    registry: str
    printed: str

    @property
    def pictures(self) -> Any:
        return self.model.encode_image(PICTURES)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Exported and registered by the command, in a working folder that is a project of uv."""
    root = tmp_path_factory.mktemp("mlflow")
    section = make_experiment(root).text.model_dump() | {"prefix": "search_query: "}
    checkpoint = write_checkpoint(make_experiment(root, text=section))
    (root / "project").mkdir()
    (root / "project/pyproject.toml").write_text('[project]\nname = "secret"\nversion = "1"\n')
    (root / "project/uv.lock").write_text('version = 1\nrequires-python = ">=3.11"\n')
    registry = f"sqlite:///{root}/registry/mlflow.db"
    (root / "registry").mkdir()
    arguments = ("export", "--checkpoint", checkpoint, "--format", "mlflow", "--output", root / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "project")
        done = CliRunner().invoke(app, [*map(str, arguments), "--register", "small", "--tracking-uri", registry])
    assert done.exit_code == 0, done.output
    assert {file.name for file in (root / "project").iterdir()} == {"pyproject.toml", "uv.lock"}
    return Case(nev.load(checkpoint, device="cpu"), root / "out", registry, done.output)


def test_what_is_written(case: Case) -> None:
    results = {str(file.relative_to(case.folder)) for file in case.folder.rglob("*") if file.is_file()}
    assert {"MLmodel", "mlflow_model.py", "requirements.txt", "README.md", "nev.json", "input_example.json"} <= results
    assert {f"artifacts/onnx/{name}" for name in ("reader.py", "vision/model.onnx", "text/model_int8.onnx")} <= results
    assert not [name for name in results if name.endswith((".pkl", ".lock", "pyproject.toml"))]
    pinned = (case.folder / "requirements.txt").read_text().split()
    assert sorted(line.partition("==")[0] for line in pinned) == [
        *("mlflow", "numpy", "onnxruntime", "pandas", "pillow", "tokenizers"),
    ]
    assert all(line.partition("==")[2] for line in pinned)
    written = (case.folder / "MLmodel").read_text()
    assert "trunk: vit_tiny_patch16_224" in written
    assert str(Path(nev.__file__).parent) not in written
    assert "/tmp" not in written
    assert "mlflow models serve" in (case.folder / "README.md").read_text()
    assert "registered  models:/small/1" in case.printed
    with pytest.raises(ModelError, match="export for another runtime"):
        nev.load(case.folder)


LOAD = """
import json
import mlflow, pandas as pd
for rows, config, params in json.loads(sys.argv[2]):
    model = mlflow.pyfunc.load_model(sys.argv[1], model_config=config)
    print(json.dumps(model.predict(pd.DataFrame(rows), params=params).tolist()))
"""


def make_rows() -> dict[str, Any]:
    """Pictures and texts, mixed."""
    first, second = map(in_base64, PICTURES)
    return {
        "image": [None, first, None, None, second, None],
        "text": [TEXTS[0], None, TEXTS[1], TEXTS[2], None, TEXTS[3]],
    }


def check_vectors(case: Case, results: Any) -> None:
    assert results.shape == (6, WIDTH)
    assert 1 - (results[[1, 4]] * case.pictures).sum(axis=1).min() < 1e-4
    assert abs(results[[0, 2, 3, 5]] - case.model.encode_text(TEXTS)).max() < 1e-5


def test_a_fresh_process_loads_the_folder_without_nev_and_torch(case: Case) -> None:
    """Also in another precision, for another kind of text, and at another width."""
    requests = [
        (make_rows(), None, None),
        (make_rows(), {"precision": "int8"}, None),
        ({"text": TEXTS}, None, {"kind": "document", "width": 16}),
    ]
    printed = run_python(LOAD, case.folder, json.dumps(requests), without=BLOCKED)
    plain, quantised, narrow = (np.array(json.loads(line)) for line in printed.splitlines()[-3:])
    check_vectors(case, plain)
    assert 1e-9 < 1 - (quantised[[1, 4]] * case.pictures).sum(axis=1).min() < 0.02
    assert abs(narrow - case.model.encode_text(TEXTS, kind="document", width=16)).max() < 1e-5


def test_the_registry_counts_versions(case: Case) -> None:
    """What it gives under the first version is what the server below answers with."""
    assert register(str(case.folder), "small", case.registry) == "models:/small/2"


def test_bytes_in_a_table(case: Case) -> None:
    import mlflow

    model = mlflow.pyfunc.load_model(str(case.folder))
    results = model.predict(pd.DataFrame({"image": PICTURES}))
    assert 1 - (results * case.pictures).sum(axis=1).min() < 1e-4


class Server(NamedTuple):
    """`mlflow models serve` on this machine."""

    port: int

    def post(self, body: Any) -> tuple[int, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/invocations",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture(scope="module")
def server(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The registered model, served in processes that cannot import nev and torch."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({BLOCKED!r})\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": case.registry,
    }
    command = ["-m", "mlflow", "models", "serve", "--model-uri", "models:/small/1", "--env-manager", "local"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            if process.poll() is not None:
                pytest.fail((folder / "log").read_text())
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield Server(port)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the group has the id of its first process
        process.wait()


def test_the_server_answers_with_the_models_vectors(case: Case, server: Server) -> None:
    rows = make_rows()
    records = [{name: column[n] for name, column in rows.items() if column[n] is not None} for n in range(6)]
    status, answer = server.post({"dataframe_records": records})
    assert status == 200
    check_vectors(case, np.array(answer["predictions"]))
    status, answer = server.post({"dataframe_records": [{"text": "a dog"}], "params": {"kind": "document"}})
    assert abs(np.array(answer["predictions"]) - case.model.encode_text(["a dog"], kind="document")).max() < 1e-5
    status, answer = server.post({"inputs": [{"image": in_base64(PICTURES[0])}]})
    assert 1 - (np.array(answer["predictions"]) * case.pictures[:1]).sum() < 1e-4


BOMB = in_base64(encoded(Image.new("1", (10_000, 10_000)), "PNG"))


@pytest.mark.parametrize(
    ("row", "params", "message"),
    [
        ({"image": "no base64!"}, {}, "row 0, image: not the base64 of a file"),
        ({"image": in_base64(b"no picture")}, {}, "row 0, image: not a picture"),
        ({"image": "/etc/passwd"}, {}, "row 0, image: not"),
        ({"image": BOMB}, {}, "row 0, image: the picture has 10000x10000 pixels, more than 64,000,000"),
        (
            {"image": in_base64(PICTURES[0]), "text": "a dog"},
            {},
            "row 0 needs an image or a text, and has image and text",
        ),
        ({"image": None, "text": None}, {}, "row 0 needs an image or a text, and has neither"),
        ({"text": 7}, {}, "row 0, text: a string is needed, not int"),
        ({"text": ["a dog"]}, {}, "row 0, text: a string is needed, not list"),
        ({"text": "a dog"}, {"kind": "title"}, "kind 'title': it is query or document"),
        ({"text": "a dog"}, {"width": 0}, "width 0: the model's vectors have 48 numbers"),
        ({"text": "a dog"}, {"width": "wide"}, "Can not safely convert"),
    ],
)
def test_the_server_refuses_with_a_reason(server: Server, row: dict[str, Any], params: Any, message: str) -> None:
    status, answer = server.post({"dataframe_records": [row], "params": params})
    assert status == 400
    assert message in answer


def test_limits_of_the_model_hold_in_the_table(case: Case) -> None:
    import mlflow

    model = mlflow.pyfunc.load_model(str(case.folder))
    config = model.unwrap_python_model().model.config["image"]
    assert (config["max_bytes"], config["max_pixels"], config["size"]) == (32 * 2**20, 64_000_000, SIZE)
    config["max_bytes"] = len(PICTURES[0]) - 1
    for form in (PICTURES[0], in_base64(PICTURES[0]), in_base64(PICTURES[0] * 9)):
        with pytest.raises(mlflow.MlflowException, match=r"row 0, image: .*more than [\d,]+"):
            model.predict(pd.DataFrame({"image": [form]}))


def test_a_table_without_a_known_column_is_refused(case: Case) -> None:
    """Not answered with no vectors: MLflow takes unknown columns away before the model sees them."""
    model = mlflow.pyfunc.load_model(str(case.folder))
    for rows in (pd.DataFrame({"txt": ["a dog"]}), ["a dog"]):
        with pytest.raises(MlflowException, match="a row has `image` or `text`"):
            model.predict(rows)


def test_what_is_refused_before_an_export(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--tracking-uri, or in MLFLOW_TRACKING_URI"):
        check_register("small", None)
    with pytest.raises(ModelError, match="no slash"):
        check_register("a/b", f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(
        ModelError, match=r"register small: --tracking-uri postgresql:\.\.\. is no MLflow server"
    ) as raised:
        check_register("small", "postgresql://ada:secret@db/mlflow")
    assert "secret" not in str(raised.value)
    with pytest.raises(ModelError, match=r"register small: MLflow at http://127\.0\.0\.1:9: "):
        check_register("small", "http://127.0.0.1:9")
    arguments = ("export", "--checkpoint", tmp_path, "--format", "onnx", "--output", tmp_path / "x")
    done = CliRunner().invoke(app, [*map(str, arguments), "--register", "small"])
    assert done.exit_code == 2
    assert "--register is for --format mlflow, not onnx" in done.output
