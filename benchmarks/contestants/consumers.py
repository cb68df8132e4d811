"""Photographs through the pre-processing of each tool that opens an export: how far its vectors lie from nev's own, and top 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from sentence_transformers import SentenceTransformer
from transformers import AutoImageProcessor, AutoModel, CLIPImageProcessor

import nev
from nev.export.export import export
from nev.export.parts import Options
from nev.export.templates import reader
from nev.inference.model import Model
from nev.ops.vectors import Floats

PROMPT = "a photo of a {}"
Photos = list[Image.Image]


def measure(trained: Path, photos: Path, folder: Path) -> dict[str, list[float]]:
    """Figures of every consumer. trained: a run. photos: a folder of ID_NAME.JPEG, a class each. folder: for the exports."""
    model = nev.load(trained, device="cpu")
    files = sorted(photos.glob("*_*.JPEG"))
    upright = [ImageOps.exif_transpose(Image.open(file)).convert("RGB") for file in files]
    names = [file.stem.partition("_")[2].replace("_", " ") for file in files]
    labels = np.asarray(model.encode_text([PROMPT.format(name) for name in names]))
    ours = np.asarray(model.encode_image(files))
    figures = {"photos": [float(len(files))], "top1_nev": [top1(ours, labels)]}
    for name, embed in open_consumers(model, folder).items():
        theirs = embed(upright)
        gaps = 1 - (theirs * ours).sum(axis=1)
        figures |= {f"top1_{name}": [top1(theirs, labels)]}
        figures |= {f"gap_mean_{name}": [float(gaps.mean())], f"gap_max_{name}": [float(gaps.max())]}
    return figures


def top1(images: Floats, labels: Floats) -> float:
    """Share of pictures [n, D] that are nearest to their own label, of [n, D]."""
    return float(((images @ labels.T).argmax(axis=1) == np.arange(len(images))).mean())


def open_consumers(model: Model, folder: Path) -> dict[str, Callable[[Photos], NDArray[Any]]]:
    """Export to `folder`, and open each export by its consumer: name -> photographs to unit vectors, float32 [n, D]."""
    for form in ("hf", "sentence-transformers", "onnx"):
        export(model, form, folder / form, Options(text=form == "sentence-transformers"))
    tower: Any = AutoModel.from_pretrained(folder / "hf").eval()
    size, mean, std = model.spec.image_size, model.spec.mean, model.spec.std
    square = {"height": size, "width": size}
    clip = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size=square, image_mean=list(mean), image_std=list(std)
    )
    router = SentenceTransformer(str(folder / "sentence-transformers"), device="cpu")

    def by_transformers(processor: Any) -> Callable[[Photos], NDArray[Any]]:
        @torch.inference_mode()
        def embed(photos: Photos) -> NDArray[Any]:
            parts = [photos[start : start + 16] for start in range(0, len(photos), 16)]
            vectors = [tower(**processor(part, return_tensors="pt")).pooler_output for part in parts]
            return np.asarray(torch.cat(vectors).numpy())

        return embed

    return {
        "transformers": by_transformers(AutoImageProcessor.from_pretrained(folder / "hf")),
        "sentence_transformers": lambda photos: np.asarray(router.encode(photos, modality="image")),
        "onnx": lambda photos: np.asarray(reader.Model(folder / "onnx").encode_image(photos)),
        "onnx_int8": lambda photos: np.asarray(reader.Model(folder / "onnx", "int8").encode_image(photos)),
        "clip": by_transformers(clip),
    }
