"""What MLflow serves: pictures and sentences to unit vectors, by `reader.py` and the graphs among the artifacts.

Needs mlflow, pandas, numpy, onnxruntime, Pillow and tokenizers.
"""

from __future__ import annotations

import base64
import binascii
import importlib.util
from typing import Any

import mlflow.models
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel
from PIL import Image


class EmbeddingModel(PythonModel):
    """A row has a picture or a text, and gives one vector."""

    def load_context(self, context: Any) -> None:
        """Open the folder of the graphs. Which precision: `model_config` of mlflow.pyfunc.load_model."""
        folder = context.artifacts["onnx"]
        spec: Any = importlib.util.spec_from_file_location("nev_reader", f"{folder}/reader.py")
        self.reader = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.reader)
        self.model = self.reader.Model(folder, context.model_config["precision"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """Embed rows: float32 [n, width], of unit length.

        model_input: columns `image` (a picture's file, in base64 or as bytes) and `text`; one of the two is filled in a row.
        params: `kind` of the texts, query or document. `width`: numbers of a vector, the first so many (Matryoshka).
        """
        settings = {"kind": "query", "width": self.model.width, **(params or {})}
        width = settings["width"]
        if not 0 < width <= self.model.width:
            raise refuse(f"width {width}: the model's vectors have {self.model.width} numbers")
        if not {"image", "text"} & set(model_input.columns):
            columns = ", ".join(map(str, model_input.columns)) or "none that it knows"
            raise refuse(f"the input has the columns {columns}: a row has `image` or `text`")
        pictures, texts = dict[int, Any](), dict[int, str]()
        for number, row in enumerate(model_input.to_dict("records")):
            filled = {name: row[name] for name in ("image", "text") if not is_missing(row.get(name))}
            if len(filled) != 1:
                raise refuse(f"row {number} needs an image or a text, and has {' and '.join(filled) or 'neither'}")
            if "text" in filled:
                texts[number] = check_text(filled["text"], number)
            else:
                pictures[number] = self._read_picture(filled["image"], number)
        vectors = np.zeros((len(model_input), self.model.width), np.float32)
        try:
            if pictures:
                vectors[list(pictures)] = self.model.encode_image(list(pictures.values()))
            if texts:
                vectors[list(texts)] = self.model.encode_text(list(texts.values()), settings["kind"])
        except ValueError as error:
            raise refuse(str(error)) from error
        vectors = vectors[:, :width]
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def _read_picture(self, value: Any, number: int) -> Image.Image:
        """The square that the tower sees: small, where the picture may be large."""
        config = self.model.config["image"]
        try:
            data = value if isinstance(value, bytes) else decode_base64(value, config["max_bytes"])
            return Image.fromarray(self.reader.read_square(data, config))
        except ValueError as error:
            raise refuse(f"row {number}, image: {error}") from error


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: None, or what pandas puts in its place."""
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


def check_text(value: Any, number: int) -> str:
    """A text as it is: it is never taken for a path or URL."""
    if not isinstance(value, str):
        raise refuse(f"row {number}, text: a string is needed, not {type(value).__name__}")
    return value


def decode_base64(value: Any, most: int) -> bytes:
    """Raises ValueError for what is no base64, or has more than `most` bytes."""
    if not isinstance(value, str):
        raise ValueError(f"base64 or bytes are needed, not {type(value).__name__}")
    if 3 * len(value) > 4 * 2 * most:  # with room for line breaks; the reader checks the bytes themselves
        raise ValueError(f"more than {most:,} bytes")
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"not the base64 of a file ({error})") from error


def refuse(message: str) -> Exception:
    """An error that the server answers with status 400."""
    error: Exception = MlflowException.invalid_parameter_value(message)
    return error


mlflow.models.set_model(EmbeddingModel())
