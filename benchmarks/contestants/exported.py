"""Models to export, and what runs them: torch, ONNX Runtime in float32, and in int8."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnxruntime
import torch

import nev
from nev.config.experiment import Experiment
from nev.config.file import load
from nev.config.model_spec import ModelSpec
from nev.data.index import build_index
from nev.eval.metrics.retrieval import retrieval
from nev.eval.validation.texts import read_captions
from nev.export.onnx import write_runtime
from nev.export.parts import Options, normalise_squares, sample_pictures
from nev.export.templates import reader
from nev.inference.checkpoints import find_checkpoint
from nev.inference.model import Model
from nev.models.image_encoder import build_image_encoder
from nev.models.prompts import list_prompts
from nev.models.text import TextTower, load_text, make_text_encoder
from nev.runs.manifest import read_manifest
from nev.runs.towers import read_experiment
from nev.storage.reading import read_column

SENTENCE = (
    "a small dog runs over the wet grass after a red and yellow ball"  # 16 tokens of MiniLM, with the special ones
)
FORMS = {"onnx": "fp32", "int8": "int8"}
PARTS = {"onnx": 0, "int8": 1}  # rows of a forward, as reader.py makes them; 0: its usual batch
Run = Callable[[float, int], float]


def make_released() -> Model:
    """The released nomic-embed-vision's architecture with random weights, without a text tower."""
    return _make_model(load("nomic_embed_vision_v1_5", ["vision.pretrained=false"]), 768, _no_text)


def make_quickstart() -> Model:
    """The quickstart's towers: a small ViT with random weights, and MiniLM."""
    config = load("quickstart")
    return _make_model(config, 384, lambda: load_text(config.text))


def _no_text() -> NoReturn:
    raise AssertionError("this model has no text tower")


def _make_model(config: Experiment, width: int, load_tower: Callable[[], TextTower]) -> Model:
    torch.manual_seed(0)
    encoder = build_image_encoder(config.vision, config.data.image_size, width)
    spec = ModelSpec(
        name=config.name,
        vision=config.vision,
        image_size=config.data.image_size,
        mean=config.data.mean,
        std=config.data.std,
        width=width,
        text=config.text,
        prompts=list_prompts(config.text.prefix),
        logit_scale=100.0,
    )
    return Model(config.name, spec, encoder, load_tower, torch.device("cpu"))


def picture_runners(model: Model, folder: Path) -> dict[str, Run]:
    """What embeds pictures, by its name: (seconds, batch) to pictures a second. The ONNX graphs are written to `folder`."""
    folder.mkdir()
    write_runtime(model, folder, Options(text=model.load_text is not _no_text), tuple(FORMS.values()), openvino=False)
    pixels = normalise_squares(model, sample_pictures(model.spec.image_size, count=32))

    def run_torch(seconds: float, batch: int) -> float:
        rows = torch.from_numpy(pixels[:batch])
        return _per_second(lambda: model.vision(rows), seconds, batch)

    runners: dict[str, Run] = {"torch": run_torch}
    usual = reader.Model(folder).config["image"]["batch"]
    for name, precision in FORMS.items():
        run = partial(_run_parts, _open(folder, "vision", precision), {"pixel_values": pixels}, PARTS[name] or usual)
        runners[name] = lambda seconds, batch, run=run: _per_second(lambda: run(batch), seconds, batch)
    return runners


def _run_parts(session: onnxruntime.InferenceSession, inputs: dict[str, Any], part: int, batch: int) -> None:
    """Embed the first `batch` rows of the inputs, `part` rows a forward."""
    for start in range(0, batch, part):
        session.run(None, {name: rows[start : min(start + part, batch)] for name, rows in inputs.items()})


def sentence_runners(model: Model, folder: Path) -> dict[str, Run]:
    """What embeds sentences, by its name. folder: where `picture_runners` wrote the graphs of this model."""
    encoder = make_text_encoder(model.text)
    tokens = reader.Model(folder).read_tokens([SENTENCE] * 32)

    def run_torch(seconds: float, batch: int) -> float:
        ids = torch.from_numpy(tokens["input_ids"][:batch])
        return _per_second(lambda: encoder(ids), seconds, batch)

    runners: dict[str, Run] = {"torch": run_torch}
    for name, precision in FORMS.items():
        run = partial(_run_parts, _open(folder, "text", precision), tokens, PARTS[name] or 64)
        runners[name] = lambda seconds, batch, run=run: _per_second(lambda: run(batch), seconds, batch)
    return runners


def _open(folder: Path, tower: str, precision: str) -> onnxruntime.InferenceSession:
    files = json.loads((folder / "preprocessing.json").read_text(encoding="utf-8"))["files"]
    return onnxruntime.InferenceSession(str(folder / files[tower][precision]), providers=["CPUExecutionProvider"])


@torch.inference_mode()
def _per_second(forward: Callable[[], Any], seconds: float, batch: int) -> float:
    for _ in range(2):
        forward()
    calls, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        forward()
        calls += 1
    return calls * batch / elapsed


def load_trained(run: Path) -> tuple[Model, float]:
    """A trained model, and the seconds until its first picture is embedded."""
    start = time.perf_counter()
    model = nev.load(run, device="cpu")
    model.encode_image(np.zeros((8, 8, 3), np.uint8))
    return model, time.perf_counter() - start


def recall(model: Model, run: Path, folder: Path) -> dict[str, float]:
    """Text-to-image recall at 10 on the run's validation set, as a share, by torch and by the int8 graphs."""
    location = find_checkpoint(str(run))
    data = read_experiment(location, read_manifest(location)).data
    index = build_index(str(data.val), data.columns)
    captions = read_captions(index)
    pictures = [
        picture
        for shard in range(len(index.paths))
        for picture in read_column(index.location(shard), str(index.columns.image)).to_pylist()
    ]
    owner = np.repeat(np.arange(len(captions)), [len(of_row) for of_row in captions])
    sentences = [caption for of_row in captions for caption in of_row]
    folder.mkdir()
    write_runtime(model, folder, Options(), tuple(FORMS.values()), openvino=False)
    small = reader.Model(folder, "int8")
    sides = {"torch": (model.encode_image, model.encode_text), "int8": (small.encode_image, small.encode_text)}
    return {
        name: retrieval(images(pictures), texts(sentences), owner, (10,))["retrieval/text_to_image/r10"]
        for name, (images, texts) in sides.items()
    }
