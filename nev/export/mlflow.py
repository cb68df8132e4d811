"""The format `mlflow`: a model of MLflow that serves the ONNX graphs, without nev, torch or a pickle.

MLflow runs the code of `mlflow_model.py` (models from code), which embeds rows by `reader.py`.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlflow
import numpy as np
import onnxruntime
import pandas as pd
import PIL
import tokenizers
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
from numpy.typing import NDArray
from PIL import Image

from nev.config.model_spec import SPEC_FILE
from nev.export.card import write_card
from nev.export.onnx import TEXTS, VISION, write_runtime
from nev.export.parts import (
    FP32,
    TEXT_FOLDER,
    Check,
    Options,
    compare,
    picture_limit,
    sample_pictures,
    write_spec,
)
from nev.export.templates import reader
from nev.inference.model import Model

GRAPHS = "onnx"  # the folder of graphs among the model's artifacts
MODEL_CODE = Path(reader.__file__).with_name("mlflow_model.py")
# What a server needs. The versions are those that the graphs were compared with.
PACKAGES = {
    "mlflow": mlflow,
    "numpy": np,
    "onnxruntime": onnxruntime,
    "pandas": pd,
    "pillow": PIL,
    "tokenizers": tokenizers,
}
EXAMPLE = 32  # pixels of the example picture; every size is resized
COPIES_PROJECT = "MLFLOW_UV_AUTO_DETECT"


def write(model: Model, folder: Path, options: Options) -> list[Check]:
    """Write the folder, and compare what MLflow computes from it."""
    with tempfile.TemporaryDirectory() as scratch:
        graphs = Path(scratch) / GRAPHS
        graphs.mkdir()
        checks, ours = write_runtime(model, graphs, options, ("fp32", "int8"), openvino=False)
        spec = write_spec(model, graphs, {}, TEXT_FOLDER if options.text else None)
        with _without_project_files():
            mlflow.pyfunc.save_model(
                folder,
                python_model=str(MODEL_CODE),
                artifacts={GRAPHS: str(graphs)},
                model_config={"precision": "fp32"},
                signature=_make_signature(spec.width),
                input_example=make_rows(sample_pictures(EXAMPLE, 1), TEXTS[:1] if options.text else ()),
                pip_requirements=[f"{name}=={package.__version__}" for name, package in PACKAGES.items()],
                metadata={"nev": spec.model_dump(mode="json", exclude={"calibration"})},
            )
        shutil.copy(graphs / SPEC_FILE, folder)
    _remove_paths(folder)
    write_card(model, folder, "mlflow", options)
    pictures = sample_pictures(spec.image_size)
    vectors = mlflow.pyfunc.load_model(str(folder)).predict(make_rows(pictures, TEXTS if options.text else ()))
    checks.append(compare("mlflow", VISION, vectors[: len(pictures)], ours[VISION], picture_limit(model)))
    if options.text:
        checks.append(compare("mlflow", TEXT_FOLDER, vectors[len(pictures) :], ours[TEXT_FOLDER], FP32))
    return checks


def make_rows(pictures: NDArray[np.uint8], texts: Sequence[str]) -> pd.DataFrame:
    """Rows for the model: pictures, uint8 [n, S, S, 3], as PNG files in base64, then texts."""
    files = []
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        files.append(base64.b64encode(file.getvalue()).decode())
    return pd.DataFrame({"image": [*files, *[None] * len(texts)], "text": [*[None] * len(files), *texts]})


def _make_signature(width: int) -> ModelSignature:
    """What goes in and comes out, for servers and for readers. width: D, of an embedding."""
    return ModelSignature(
        inputs=Schema([ColSpec("string", "image", required=False), ColSpec("string", "text", required=False)]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, -1))]),
        params=ParamSchema([ParamSpec("kind", "string", "query"), ParamSpec("width", "long", width)]),
    )


def _remove_paths(folder: Path) -> None:
    """Take the paths of this machine out of `MLmodel`: MLflow notes where things came from, and does not read it again."""
    saved = mlflow.models.Model.load(folder)
    flavor = saved.flavors[mlflow.pyfunc.FLAVOR_NAME]
    flavor["model_code_path"] = MODEL_CODE.name
    flavor["artifacts"][GRAPHS]["uri"] = flavor["artifacts"][GRAPHS]["path"]
    saved.save(folder / "MLmodel")


@contextmanager
def _without_project_files() -> Iterator[None]:
    """Where the working folder is a project of uv, MLflow would copy that project's files into the model."""
    before = os.environ.get(COPIES_PROJECT)
    os.environ[COPIES_PROJECT] = "false"
    try:
        yield
    finally:
        del os.environ[COPIES_PROJECT]
        if before is not None:
            os.environ[COPIES_PROJECT] = before
