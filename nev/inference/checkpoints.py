"""A run's checkpoint as a model: what it is, its vision tower, and how its text tower is loaded."""

from __future__ import annotations

from functools import partial
from typing import Any

from nev.config.experiment import Experiment
from nev.config.model_spec import Calibration, ModelError, ModelSpec, Training
from nev.inference.folders import ChooseText, Opened
from nev.models.image_encoder import make_image_encoder
from nev.models.prompts import list_prompts
from nev.models.text import text_width
from nev.runs.checkpoint import load_model, read_means
from nev.runs.manifest import Damaged, best_checkpoint, latest_checkpoint, read_manifest, read_metrics
from nev.runs.towers import TEXT, load_same_text_tower, load_vision, read_experiment
from nev.storage.files import filesystem


def find_checkpoint(run: str) -> str:
    """The checkpoint of a run that counts: the best one by `eval.best`, else the newest. Raises ModelError for a run without."""
    newest = latest_checkpoint(run)
    if newest is None:
        raise ModelError(f"{run} is a run without a whole checkpoint: train it further, or give another run")
    metric = (read_manifest(newest)["config"].get("eval") or {}).get("best")
    return (best_checkpoint(run, metric) if metric else None) or newest


def choose_checkpoint(location: str) -> str:
    """The checkpoint itself, or that of a run that counts (`find_checkpoint`)."""
    fs, path = filesystem(location.rstrip("/"))
    is_run = not fs.exists(f"{path}/state.json") and fs.exists(f"{path}/checkpoints")
    return find_checkpoint(location) if is_run else location


def read_checkpoint(location: str, choose: ChooseText) -> Opened:
    """Read a checkpoint as a model. choose: the caller's changes of the section `text`.

    Raises CheckpointError for a checkpoint that is damaged, or needs a locked trunk that is not to be had here.
    """
    manifest = read_manifest(location)
    config = read_experiment(location, manifest)
    config = config.model_copy(update={"text": choose(config.text)})
    width = text_width(config.text)
    _, weights = load_model(location)
    encoder = make_image_encoder(load_vision(location, config, width, weights))
    return (
        describe_checkpoint(location, manifest, config, width, float(weights["log_scale"].exp())),
        encoder,
        # Not all weights: those of the vision tower would stay in memory twice.
        partial(
            load_same_text_tower,
            location,
            manifest,
            config,
            {name: tensor for name, tensor in weights.items() if name.startswith(TEXT)},
        ),
    )


def describe_checkpoint(
    location: str, manifest: dict[str, Any], config: Experiment, width: int, logit_scale: float
) -> ModelSpec:
    """What the model of a checkpoint is. manifest: `state.json`. width: D, of the embedding. logit_scale: 1 / temperature."""
    means = read_means(location)
    if means is not None and means.shape != (2, width):
        raise Damaged(f"{location}: the means of its validation are {list(means.shape)}, and its vectors {width} wide")
    return ModelSpec(
        name=config.name,
        vision=config.vision,
        image_size=config.data.image_size,
        mean=config.data.mean,
        std=config.data.std,
        limits=config.data.limits,
        width=width,
        text=config.text,
        text_fingerprint=manifest["fingerprints"]["text"] if config.lock == "text" else None,
        prompts=list_prompts(config.text.prefix),
        logit_scale=logit_scale,
        calibration=None if means is None else Calibration(image_mean=tuple(means[0]), text_mean=tuple(means[1])),
        training=Training(
            step=manifest["step"],
            data=manifest["fingerprints"].get("data"),
            global_batch=config.train.global_batch,
            metrics=read_metrics(location),
            settings={
                "lock": config.lock,
                **{name: getattr(config, name).model_dump(mode="json") for name in ("loss", "optim")},
                "augment": config.data.augment and config.data.augment.model_dump(mode="json"),
            },
        ),
    )
