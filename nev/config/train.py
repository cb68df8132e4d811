"""The schema of how a run trains: the sections `optim`, `train`, `guards` and `workers`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nev.config.base import MOST, Location, Positive, Section

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
    """Weight decay of the matrices and kernels of layers. Biases, norms, class tokens, latents, positions and the logit scale
    have none.
    """
    clip_norm: float | None = Field(default=1.0, gt=0, le=1e9)
    """Norm to which the gradient of the mean loss over the global batch is clipped. A limit for a loss that is multiplied by the
    number of GPUs, as contrastors' is, is divided by that number here. null: no clipping.
    """
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
