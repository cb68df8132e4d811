"""Vectors of a corpus: drawn pictures, models with random weights, the command, and a bare forward loop."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.contestants.processes import BenchmarkFailed, run_script
from nev.config.experiment import Experiment
from nev.config.file import load

DECODED = 2048  # pictures that pass the bare forward again and again
BATCHES = (16, 32, 64, 128, 256)
FORWARD_S = 10.0  # of each batch size
LOADER_S = 20.0
WRITTEN = re.compile(r"vector files? written, ([\d,]+) pictures, ([\d,]+) pictures/s")
PACE = re.compile(r"([\d,]+) pictures/s$", re.MULTILINE)


class Embedded(NamedTuple):
    """The command, once.

    pictures_per_s: of the work, with the start of the processes that embed.
    pace_per_s: after the first pictures have come.
    wall_s: of the command, from its start to its end.
    """

    pictures_per_s: float
    pace_per_s: float
    wall_s: float


def draw_pictures(folder: Path, count: int) -> str:
    """Draw pictures of the quickstart's kind. Returns the folder of the shards."""
    size = ("--train", str(count), "--val", "64", "--rows-per-shard", "4096", "--processes", str(os.cpu_count() or 1))
    run_script("pipelines/prepare.py", "--source", "synthetic", *size, "--output", str(folder))
    return str(folder / "train")


def save_random_model(folder: Path, overrides: list[str]) -> str:
    """Write a checkpoint of the quickstart's experiment, with other settings, and random weights. Returns its location."""
    import torch

    from nev.models.dual_encoder import DualEncoder
    from nev.models.text import load_text
    from nev.models.vision import build_vision
    from nev.runs.checkpoint import save
    from nev.runs.manifest import CheckpointState

    config: Experiment = load("quickstart", overrides)
    torch.manual_seed(0)
    text = load_text(config.text)
    model = DualEncoder(build_vision(config.vision, config.data.image_size, text.width), config.loss, None)
    fingerprints = {"data": "0" * 64, "plan": "0" * 64, "text": text.fingerprint}
    state = CheckpointState(1, config.model_dump(mode="json"), fingerprints, {}, 1, 0, {})
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return save(str(folder / "run"), state, (tensors, {}), {}, {})


def embed_corpus(model: str, shards: str, output: Path, limit: int | None) -> Embedded:
    """The command over the shards, from nothing. limit: most shards. None: all."""
    shutil.rmtree(output, ignore_errors=True)
    inputs = sorted(Path(shards).glob("*.parquet"))[:limit]
    given = [part for each in inputs for part in ("--input", str(each))]
    begin = time.perf_counter()
    printed = run_script(
        "pipelines/embed_images.py", "--model", model, *given, "--output", str(output), "--no-captions"
    )
    seconds = time.perf_counter() - begin
    written, paces = WRITTEN.search(printed), PACE.findall(printed)
    if not written or not paces:
        raise BenchmarkFailed(f"pipelines/embed_images.py has printed no rate:\n{printed}")
    rate, pace = (float(text.replace(",", "")) for text in (written[2], paces[-1]))
    return Embedded(rate, pace, seconds)


def forward_per_s(
    model: str, shards: str, batches: tuple[int, ...] = BATCHES, seconds: float = FORWARD_S, decoded: int = DECODED
) -> float:
    """Pictures a second of a bare loop: decoded pictures in memory are normalised and embedded, on every core, in one process.

    To be called in a process of its own. The best of some batch sizes; seconds: for how long each is measured.
    """
    import numpy as np
    import torch

    from nev.data.sources import SOURCES, SourceOptions, iterate_rows
    from nev.inference.load import load as load_model
    from nev.inference.pictures import read_squares
    from nev.models.vision import as_input

    torch.set_num_threads(os.cpu_count() or 1)
    opened = load_model(model, device="cpu")
    spec = opened.spec
    rows = iterate_rows(SOURCES["hf-parquet"]([shards], SourceOptions(captioned=False)))
    images = (row["image"] for _, row in zip(range(decoded), rows, strict=False))
    squares = [square for some in read_squares(images, spec.image_size, spec.limits, 64) for square in some]
    pictures = torch.from_numpy(np.stack([square.pixels for square in squares]))

    def rate(batch: int) -> float:
        parts = [part for part in pictures.split(batch) if len(part) == batch]
        opened.vision(as_input(parts[0], spec.mean, spec.std))
        begin, done = time.perf_counter(), 0
        while (passed := time.perf_counter() - begin) < seconds:
            opened.vision(as_input(parts[done % len(parts)], spec.mean, spec.std))
            done += 1
        return done * batch / passed

    with torch.inference_mode():
        return max(map(rate, batches))


def dataloader_per_s(model: str, shards: str, batch: int = 256, seconds: float = LOADER_S) -> float:
    """Pictures a second of the loop that users write: torch's DataLoader decodes by Pillow, then the model embeds.

    To be called in a process of its own. A process a core decodes bytes that are in memory; their start does not count.
    """
    import io

    import pyarrow.parquet as pq
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

    from nev.inference.load import load as load_model
    from nev.models.vision import as_input

    torch.set_num_threads(os.cpu_count() or 1)
    opened = load_model(model, device="cpu")
    spec = opened.spec
    view = Compose([Resize(spec.image_size, InterpolationMode.BICUBIC), CenterCrop(spec.image_size), PILToTensor()])
    images = pq.read_table(sorted(Path(shards).glob("*.parquet"))[0], columns=["image"])["image"].to_pylist()

    def collate(some: list[bytes]) -> torch.Tensor:
        return torch.stack([view(Image.open(io.BytesIO(image)).convert("RGB")) for image in some])

    workers = os.cpu_count() or 1
    loader = DataLoader(images * 64, batch, collate_fn=collate, num_workers=workers, multiprocessing_context="fork")
    embedded, begin = 0, 0.0
    with torch.inference_mode():
        for number, squares in enumerate(loader):
            opened.vision(as_input(squares.permute(0, 2, 3, 1).contiguous(), spec.mean, spec.std))
            if number == workers:
                begin, embedded = time.perf_counter(), -len(squares)
            embedded += len(squares)
            if begin and (passed := time.perf_counter() - begin) > seconds:
                return embedded / passed
    raise BenchmarkFailed(f"{shards}: too few pictures for {seconds} s")
