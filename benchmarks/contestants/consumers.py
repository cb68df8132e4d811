"""Exports of a trained model, each by the tool that opens it: size, time to open, and photographs through its pre-processing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from sentence_transformers import SentenceTransformer
from transformers import AutoImageProcessor, AutoModel, CLIPImageProcessor

import nev
from nev.export.export import export
from nev.export.mlflow import make_rows
from nev.export.templates import reader
from nev.inference.model import Model
from nev.ops.vectors import Floats

PROMPT = "a photo of a {}"
Photos = list[Image.Image]
Embed = Callable[[Photos], NDArray[Any]]  # photographs to unit vectors, float32 [n, D]


def measure(trained: Path, photos: Path, folder: Path) -> dict[str, list[float]]:
    """Figures of every export. trained: a run. photos: a folder of ID_NAME.JPEG, a class each. folder: for the exports."""
    model = nev.load(trained, device="cpu")
    figures = dict[str, list[float]]()
    consumers = dict[str, Embed]()
    for form, openers in FORMS.items():
        exported = export(model, form, folder / form)
        figures[f"{form}_mb"] = [exported.bytes / 1e6]
        left_out = {check.what for check in exported.checks if check.left_out}
        for name, opener in openers.items():
            if f"vision, {name.rpartition('_')[2]}" in left_out:  # it missed its limit, and is not in the folder
                continue
            start = time.perf_counter()
            consumers[name] = opener(folder / form, model)
            figures[f"{name}_open_s"] = [time.perf_counter() - start]
    files = sorted(photos.glob("*_*.JPEG"))
    upright = [ImageOps.exif_transpose(Image.open(file)).convert("RGB") for file in files]
    names = [file.stem.partition("_")[2].replace("_", " ") for file in files]
    labels = np.asarray(model.encode_text([PROMPT.format(name) for name in names]))
    ours = np.asarray(model.encode_image(files))
    figures |= {"photos": [float(len(files))], "nev_top1": [top1(ours, labels)]}
    for name, embed in consumers.items():
        theirs = embed(upright)
        gaps = 1 - (theirs * ours).sum(axis=1)
        figures |= {f"{name}_top1": [top1(theirs, labels)]}
        figures |= {f"{name}_gap_mean": [float(gaps.mean())], f"{name}_gap_max": [float(gaps.max())]}
    return figures


def top1(images: Floats, labels: Floats) -> float:
    """Share of pictures [n, D] that are nearest to their own label, of [n, D]."""
    return float(((images @ labels.T).argmax(axis=1) == np.arange(len(images))).mean())


def open_transformers(folder: Path, model: Model) -> Embed:
    """The vision tower with the processor of the export."""
    return _by_processor(folder, AutoImageProcessor.from_pretrained(folder))


def open_clip_processor(folder: Path, model: Model) -> Embed:
    """The vision tower with CLIP's processor, which resizes before it cuts: what an export does not have."""
    size, mean, std = model.spec.image_size, list(model.spec.mean), list(model.spec.std)
    square = {"height": size, "width": size}
    return _by_processor(
        folder, CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square, image_mean=mean, image_std=std)
    )


def _by_processor(folder: Path, processor: Any) -> Embed:
    tower: Any = AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def embed(photos: Photos) -> NDArray[Any]:
        parts = [photos[start : start + 16] for start in range(0, len(photos), 16)]
        vectors = [tower(**processor(part, return_tensors="pt")).pooler_output for part in parts]
        return np.asarray(torch.cat(vectors).numpy())

    return embed


def open_sentence_transformers(folder: Path, model: Model) -> Embed:
    """Both towers."""
    router = SentenceTransformer(str(folder), device="cpu")
    return lambda photos: np.asarray(router.encode(photos, modality="image"))


def open_reader(folder: Path, precision: str) -> Embed:
    """Both towers, by the folder's own reader."""
    opened = reader.Model(folder, precision)
    opened.encode_image([Image.new("RGB", (8, 8))])  # towers are loaded when they are first used
    opened.encode_text(["a"])
    return lambda photos: np.asarray(opened.encode_image(photos))


def open_mlflow(folder: Path, model: Model) -> Embed:
    """Both towers, as MLflow serves them."""
    opened = mlflow.pyfunc.load_model(str(folder))
    return lambda photos: np.concatenate([opened.predict(make_rows([np.asarray(photo)], ())) for photo in photos])


FORMS: dict[str, dict[str, Callable[[Path, Model], Embed]]] = {
    "hf": {"transformers": open_transformers, "clip_processor": open_clip_processor},
    "sentence-transformers": {"sentence_transformers": open_sentence_transformers},
    "onnx": {
        "onnxruntime": lambda folder, model: open_reader(folder, "fp32"),
        "onnxruntime_fp16": lambda folder, model: open_reader(folder, "fp16"),
        "onnxruntime_int8": lambda folder, model: open_reader(folder, "int8"),
    },
    "mlflow": {"mlflow": open_mlflow},
}
