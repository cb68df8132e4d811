"""The schema of an experiment, which is one YAML file (`nev.config.file` reads it).

Every section is frozen and refuses unknown keys, so a misspelt key is an error before anything starts.
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from nev.config.base import Address, ConfigError, Location, Section, Seed
from nev.config.data import Data
from nev.config.eval import Eval
from nev.config.model import Loss, Text, Vision
from nev.config.train import Guards, Optim, Train, Workers


class Tracking(Section):
    """MLflow, which keeps parameters and metrics, and what Ray's metrics need."""

    uri: Address | None = None
    """Address of MLflow's tracking server or database. null: SQLite in `<output>/mlflow.db`, where `output` is a folder."""
    experiment: str = "nev"
    """Name of the MLflow experiment."""
    prices: str | None = None
    """File of prices, as `nev plan --prices` takes. With it the cost of the cluster is among Ray's metrics. null: no cost."""


class Experiment(Section):
    """A training run. The folder of the run is `<output>/<name>`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    seed: Seed = 0
    """Seed of the initial weights, the order of the rows and the augmentation."""
    output: Location = "runs"
    """Place of the runs: a folder, or `s3://bucket/prefix`."""
    lock: Literal["text", "image", "none"] = "text"
    """Tower that is not trained and stays the same bit for bit: `text` (LiT, arXiv 2111.07991; arXiv 2406.18587), `image`, or
    `none`, which trains both (CLIP, arXiv 2103.00020).
    """
    data: Data
    """Pictures and captions."""
    text: Text = Text()
    """Text tower."""
    vision: Vision
    """Vision tower."""
    loss: Loss = Loss()
    """Contrastive loss."""
    optim: Optim
    """Optimiser and learning rate."""
    train: Train
    """Length, batch, precision, and how often a run logs, saves and validates."""
    guards: Guards = Guards()
    """Limits for steps that go wrong."""
    eval: Eval = Eval()
    """Validation on `data.val`."""
    workers: Workers = Workers()
    """Training processes and their resources."""
    tracking: Tracking = Tracking()
    """MLflow, and prices for Ray's metrics."""

    def refuse_trained_trunk(self) -> None:
        """Raise ConfigError for an experiment without image sidecars, since its trunk is trained."""
        if not self.vision.lock:
            raise ConfigError(
                f"{self.name} trains its trunk, so it needs no image sidecars: run `nev train`, or give vision.lock: trunk"
            )

    @property
    def text_online(self) -> bool:
        """Whether the text tower runs in the training loop."""
        return self.text.mode == "online" or self.lock != "text"

    @property
    def initial_bias(self) -> float | None:
        """Initial bias of a sigmoid loss; None for another loss."""
        if self.loss.kind != "sigmoid":
            return None
        return -math.log(self.train.global_batch) if self.loss.init_bias is None else self.loss.init_bias

    def local_batch(self, world: int) -> int:
        """Rows of a worker's share of the batch, in whole blocks. Where shares differ, the largest share."""
        return -(-self.train.global_batch // self.data.block_rows // world) * self.data.block_rows

    @model_validator(mode="after")
    def _locks(self) -> Self:
        if self.lock != "text" and self.text.mode == "sidecar":
            raise ValueError(
                f"lock: {self.lock} trains the text tower, so sidecars cannot hold its vectors: leave text.mode out"
            )
        if self.text_online and (self.text.noise or self.text.center):
            raise ValueError(
                "text.noise and text.center change the vectors of sidecars, and here the text tower runs online: leave them out"
            )
        if self.loss.kernel == "fused" and not self.workers.gpus:
            raise ValueError("loss.kernel: fused needs NVIDIA GPUs (workers.gpus); leave loss.kernel out")
        if self.lock == "image" and not (self.vision.pretrained or self.vision.weights or self.train.from_):
            raise ValueError(
                "lock: image would lock random weights: give vision.weights, vision.pretrained: true, or train.from"
            )
        if self.vision.lock and self.lock != "text":
            raise ValueError(
                f"vision.lock: trunk trains a head into the space of a locked text tower, and lock: {self.lock} trains the text "
                "tower: leave lock out, or vision.lock"
            )
        if self.vision.lock and (self.train.activation_checkpointing or self.train.compile):
            raise ValueError(
                "train.activation_checkpointing and train.compile are for a trunk that is trained, and vision.lock: trunk trains "
                "what comes after it: leave them out"
            )
        if self.vision.from_sidecars and self.vision.views == 1 and self.data.augment is not None:
            raise ValueError(
                "vision.views: 1 would keep one random crop of each picture for all epochs: give data.augment: null (the view of "
                "evaluation), or vision.views above 1"
            )
        if self.vision.views > 1 and self.data.augment is None:
            raise ValueError(
                f"vision.views = {self.vision.views} without augmentation would keep one view {self.vision.views} times: give "
                "data.augment, or leave vision.views out"
            )
        return self

    @model_validator(mode="after")
    def _several_sets(self) -> Self:
        if self.data.by_weight and self.train.epochs:
            raise ValueError("train.epochs: shares that are weights know no epoch: give train.steps or train.samples")
        if len(self.data.train_sets) > 1 and (self.text.center or self.vision.standardise):
            raise ValueError(
                "text.center and vision.standardise take their statistics from one set, and data.train has several: leave them "
                "out"
            )
        return self

    @model_validator(mode="after")
    def _whole_blocks(self) -> Self:
        batch, block, part, workers = (
            self.train.global_batch,
            self.data.block_rows,
            self.train.micro_batch,
            self.workers,
        )
        elastic = workers.least != workers.most
        if batch % (block * (1 if elastic else workers.most)):
            raise ValueError(
                f"train.global_batch ({batch}) must be a multiple of data.block_rows x workers.count "
                f"({block} x {workers.most} = {block * workers.most}), so that every rank gets whole blocks"
                if not elastic
                else f"train.global_batch ({batch}) must be a multiple of data.block_rows ({block})"
            )
        streams = self.data.streams
        if streams > 1 and elastic:
            raise ValueError(
                f"data.streams ({streams}) needs a number of workers that stays: give workers.count, without min and max"
            )
        if workers.most % streams or batch // block % streams:
            raise ValueError(
                f"data.streams ({streams}) must divide the {workers.most} workers and the {batch // block} blocks of a step: "
                "each stream has an equal part of both"
            )
        if workers.most > batch // block:
            raise ValueError(
                f"workers.max ({workers.most}) is more than the {batch // block} blocks of a step: lower it, or data.block_rows"
            )
        for world in range(workers.least, workers.most + 1):
            local = self.local_batch(world)
            if part is not None and local % min(part, local):
                raise ValueError(
                    f"train.micro_batch ({part}) must divide a worker's share of train.global_batch, {local} rows at "
                    f"W = {world}. A divisor of data.block_rows always does."
                )
        return self
