"""The schema of an experiment, which is one YAML file (`nev.config.file` reads it).

Every section is frozen and refuses unknown keys, so a misspelt key is an error before anything starts.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nev.config.base import MOST, Address, ConfigError, Location, Positive, Section, Seed
from nev.config.data import Data
from nev.config.model import Loss, Text, Vision

FLOAT32 = 3.4e38  # a float32 holds no more
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]


class Optim(Section):
    """AdamW (Loshchilov & Hutter 2019) and its learning rate."""

    lr: float = Field(gt=0, le=FLOAT32)
    """Peak learning rate."""
    text_lr_ratio: float = Field(default=1.0, gt=0, le=1e3)
    """Learning rate of a trained text tower, as a share of `lr`. The tower comes pretrained: a rate for a fresh vision tower
    undoes that.
    """
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    """Decay of AdamW's first and second moments."""
    eps: float = Field(default=1e-8, gt=0, le=1)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0, le=1e3)
    """Weight decay of matrices. Biases, norms and the logit scale have none."""
    clip_norm: float | None = Field(default=1.0, gt=0, le=1e9)
    """Norm to which the gradient of the global batch is clipped. null: no clipping."""
    warmup_steps: int = Field(default=0, ge=0, le=MOST)
    """Length of the linear warm-up, in steps."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """Learning rate after the warm-up: `cosine` to `final_lr` (Loshchilov & Hutter 2017), `constant`, or `wsd`, constant until a
    decay at the end (Hägele et al. 2024, arXiv 2405.18392). A run with `constant` or `wsd` can be prolonged.
    """
    decay_steps: Positive | None = None
    """Length of the decay at the end of `wsd`, in steps. null: a fifth of the run."""
    final_lr: float = Field(default=0.0, ge=0, le=FLOAT32)
    """Learning rate at the end of the run, for `cosine` and `wsd`."""

    @model_validator(mode="after")
    def _decay_of_what(self) -> Self:
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(f"decay_steps belongs to schedule: wsd, and the schedule is {self.schedule}")
        return self


class Profile(Section):
    """PyTorch's profiler over chosen steps, on rank 0."""

    steps: tuple[Positive, ...] = Field(min_length=1)
    """Numbers of the profiled steps, ascending, as metrics have them: 1 is the first step. Consecutive steps share a trace."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"steps must ascend, each step once: {list(self.steps)}")
        return self


class Train(Section):
    """How long, how large, how often. Exactly one of `epochs`, `steps` and `samples` sets the length."""

    global_batch: Positive
    """Rows of a step over all workers, B. A multiple of `data.block_rows` x `workers.count`."""
    micro_batch: Positive | None = None
    """Images that a worker embeds at a time (GradCache, arXiv 2101.06983), for a share of the batch that does not fit in memory.
    null: the whole share at once.
    """
    epochs: Positive | None = None
    """Length of the run, in epochs."""
    steps: Positive | None = None
    """Length of the run, in steps."""
    samples: Positive | None = None
    """Length of the run, in rows, rounded up to whole steps."""
    from_: Location | None = Field(default=None, alias="from")
    """Checkpoint, or run, whose model a new run begins from: towers and logit scale, without the optimiser. It replaces what
    `vision.pretrained` and `vision.weights` bring. null: those, or random weights.
    """
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the towers' forward and backward. `bf16`: autocast over fp32 weights. `auto`: bf16 on a GPU that has it,
    else fp32. The loss is computed in fp32.
    """
    activation_checkpointing: bool = False
    """Inputs of the trunk's blocks are kept and the rest is computed again in the backward (Chen et al. 2016): less memory, more
    time.
    """
    compile: bool = False
    """torch.compile of the vision tower."""
    save_trunk: bool = False
    """A locked trunk's weights in every checkpoint, too. false: a checkpoint names its trunk by fingerprint."""
    fsdp: bool = False
    """Weights, gradients and moments split over the workers (FSDP2), for a trunk that does not fit on one."""
    log_every: Positive = 10
    """Steps between two logged lines of metrics."""
    checkpoint_every: Positive = 500
    """Steps between two checkpoints."""
    keep_last: Positive = 2
    """Number of newest checkpoints that are kept, beside the best by `eval.best`."""
    eval_every: Positive | None = None
    """Steps between two validations. null: validation after the last step only."""
    profile: Profile | None = None
    """Steps whose traces by PyTorch's profiler go to the run's folder and to MLflow. null: none."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [name for name in ("epochs", "steps", "samples") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of epochs, steps, samples (null takes one away); got {given or 'none'}")
        return self


class Guards(Section):
    """Steps that go wrong. A step whose loss or gradient is not finite is skipped: weights and moments stay as they were."""

    max_skipped: int = Field(default=10, ge=0, le=MOST)
    """Skipped steps among the last 1,000 that the run survives; one more ends the run."""
    spike_sigmas: float | None = Field(default=6.0, gt=0, le=1e9)
    """Height from which a loss is reported as a spike, in standard deviations above its running mean. null: never."""


class Workers(Section):
    """Training processes: `count` of them, or as many from `min` to `max` as the cluster has room for."""

    count: Positive | None = None
    """Number of workers, W. null, without `min` and `max`: 1."""
    min: Positive | None = None
    """Fewest workers that train, where their number follows the cluster's room."""
    max: Positive | None = None
    """Most workers that train, where their number follows the cluster's room."""
    cpus: float = Field(default=0.0, ge=0, le=1e5)
    """CPU cores that each worker reserves from Ray; the rest decodes images. 0: training and decoding share all cores."""
    gpus: float = Field(default=0.0, ge=0, le=1e5)
    """GPUs that each worker reserves from Ray."""
    memory: Positive = 256 * 2**20
    """Memory that each worker reserves from Ray, in bytes."""
    threads: Positive | None = None
    """torch threads of a worker. null: the machine's cores divided by the workers on the machine."""
    max_failures: int = Field(default=3, ge=-1, le=MOST)
    """Restarts of the workers after failures before the run ends with an error. -1: no limit."""
    timeout_s: Positive = 1800
    """Time that a worker waits for another worker, in seconds; after that all workers are started again."""
    resize_s: float = Field(default=60.0, gt=0, le=1e9)
    """Time between two looks for room for more workers, in seconds. A resize repeats the steps since the latest checkpoint."""

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
    """Classes as sentences (Radford et al. 2021): the vector of a class is the mean of its filled-in templates."""

    classes: tuple[str, ...] | Location
    """Class names in the order of the integer labels: a list, or a text file of one name a line."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Sentences, each with one `{}` for the class name."""

    @model_validator(mode="after")
    def _has_slot(self) -> Self:
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(f"a template needs exactly one '{{}}' for the class name: {template!r}")
        return self


class Eval(Section):
    """What is measured on `data.val`."""

    zero_shot: ZeroShot | None = None
    """Zero-shot classification by the label column. null: none."""
    retrieval: bool = False
    """Retrieval between images and captions, both ways."""
    batch: Positive = 256
    """Images embedded at a time."""
    best: str | None = None
    """Metric by which the best checkpoint is chosen, such as `zero_shot/top1`. null: the newest checkpoint counts."""
    patience: Positive | None = None
    """Validations in a row without a better `best` after which the run ends. null: the run goes to its last step."""
    asynchronous: bool = False
    """Validation of checkpoints by the driver, beside training, on GPUs that the workers leave free, or on CPUs. false: the
    workers validate, and training waits.
    """

    @model_validator(mode="after")
    def _patience_with_what(self) -> Self:
        if self.patience and not self.best:
            raise ValueError("patience needs `best`, the metric that has to improve")
        return self


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
