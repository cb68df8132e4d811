"""open_clip's own trainer with `--lock-text`: `python -m open_clip_train.main`, its code untouched.

A model folder in a temporary place says all (`--model local-dir:`): open_clip's own ViT with the width, depth, heads and
patch of the config, and the text encoder's folder as `hf_model_name` with mean pooling and no projection. Beside the config
lie links to the tokenizer's files, for open_clip looks for them there; the weights stay where they are.

`--lock-text` leaves the text tower's LayerNorms trainable, so the tower moves and a backward pass goes through it; only
`--lock-text-freeze-layer-norm` beside it locks the tower whole. Both are measured.
"""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.contestants.processes import BenchmarkFailed, lines_of_module, warm_up_steps
from nev.config.experiment import Experiment

MODULES = ("open_clip", "open_clip_train", "webdataset")
INSTALL = "uv pip install --group bench"
WORKERS = 2
STEP = re.compile(r"Batch \(t\): ([\d.]+)")  # the meter starts anew at every logged step, so this is one step's time


def not_installed() -> list[str]:
    """The modules that are missing."""
    return [name for name in MODULES if importlib.util.find_spec(name) is None]


def open_clip_lit(config: Experiment, steps: int, tars: list[Path], freeze_layer_norm: bool) -> float:
    """Train on the tars in one process on every core; images/s after the warm-up.

    The trainer is stopped after `steps` steps of its epoch, while its loaders are still busy: a whole epoch would end with
    batches that were decoded before. Raises BenchmarkFailed.
    """
    seconds: list[float] = []
    with tempfile.TemporaryDirectory(prefix="nev-bench-") as folder:
        model = Path(folder, "model")
        write_model(config, model)
        args = arguments(config, steps, tars, model, freeze_layer_norm)
        with lines_of_module("open_clip_train.main", args, Path(folder)) as lines:
            for line in lines:
                if found := STEP.search(line):
                    seconds.append(float(found[1]))
                if len(seconds) == steps:
                    break
    if len(seconds) < steps:
        raise BenchmarkFailed(f"open_clip logged {len(seconds)} of {steps} steps")
    counted = seconds[warm_up_steps(steps) :]
    return config.train.global_batch * len(counted) / sum(counted)


def arguments(config: Experiment, steps: int, tars: list[Path], model: Path, freeze_layer_norm: bool) -> list[str]:
    """The command line: the config's batch, optimiser, clipping and crop. open_clip's own crop has no flip."""
    optim = config.optim
    given: dict[str, Any] = {
        "model": f"local-dir:{model}",
        "train-data": "::".join(map(str, tars)),
        "dataset-type": "webdataset",
        "train-num-samples": (steps + 8 * WORKERS) * config.train.global_batch,  # more than it will be let do
        "batch-size": config.train.global_batch,
        "workers": WORKERS,
        "epochs": 1,
        "precision": "fp32",
        "device": "cpu",
        "lr": optim.lr,
        "beta1": optim.betas[0],
        "beta2": optim.betas[1],
        "eps": optim.eps,
        "wd": optim.weight_decay,
        "warmup": optim.warmup_steps,
        "aug-cfg": f"scale={config.data.augment.scale}",
        "log-every-n-steps": 1,
        "logs": "logs",
        "name": "run",
    }
    if optim.clip_norm is not None:
        given["grad-clip-norm"] = optim.clip_norm
    flags = ["--lock-text", *(["--lock-text-freeze-layer-norm"] if freeze_layer_norm else [])]
    return [part for key, value in given.items() for part in (f"--{key}", str(value))] + flags


def write_model(config: Experiment, folder: Path) -> None:
    """A folder that open_clip takes as a model: its config, and links to the tokenizer's files."""
    from nev.models.text import load_text

    text = load_text(config.text)
    encoder = Path(text.tokenizer.name_or_path)
    vision = config.vision.trunk_args
    if lacking := {"patch_size", "embed_dim", "depth", "num_heads"} - set(vision):
        raise BenchmarkFailed(f"open_clip's ViT needs vision.trunk_args {', '.join(sorted(lacking))} in the config")
    model = {
        "embed_dim": text.width,
        "vision_cfg": {
            "image_size": config.data.image_size,
            "patch_size": vision["patch_size"],
            "width": vision["embed_dim"],
            "layers": vision["depth"],
            "head_width": vision["embed_dim"] // vision["num_heads"],
            "no_ln_pre": True,  # as timm's ViT
        },
        "text_cfg": {
            "hf_model_name": str(encoder),
            "hf_tokenizer_name": str(encoder),
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": None,
            "context_length": config.text.max_tokens,
        },
    }
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}), encoding="utf-8")
    for file in encoder.iterdir():
        if file.suffix in (".json", ".txt"):
            (folder / file.name).symlink_to(file)
