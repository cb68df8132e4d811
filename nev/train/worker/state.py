"""The model and its optimiser on this rank, from the seed or from a checkpoint. No Ray."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from nev.common.collectives import broadcast_object, first_error
from nev.common.errors import NevError, first_line
from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.losses.fused import unsupported_reason
from nev.models.dual_encoder import DualEncoder
from nev.models.frozen import FeatureHead, FrozenTrunk, build_feature_head, load_same_trunk, read_head_weights
from nev.models.precision import Precision
from nev.models.text import TextTower, load_text, make_text_encoder
from nev.models.text_encoder import unlock
from nev.models.vision import VisionTower, build_vision
from nev.runs import checkpoint
from nev.runs.manifest import (
    PATIENCE_S,
    CheckpointError,
    CheckpointState,
    Damaged,
    checkpoint_location,
    checkpoint_step,
    list_steps,
    with_retries,
)
from nev.train.core.gradcache import refuse_batch_norm
from nev.train.core.optim import make_optimizer
from nev.train.core.parallel import broadcast_tensors, distribute
from nev.train.core.rng import restore_rng, seed_rank
from nev.train.core.state_dict import load_optimizer, unknown_parameters
from nev.train.core.vision_setup import apply_train_options
from nev.train.job import Job, ResumePoint
from nev.train.start_weights import load_start

T = TypeVar("T")


@dataclass(frozen=True)
class RankContext:
    """This process among the W ranks."""

    rank: int
    world: int
    device: torch.device
    precision: Precision


@dataclass(frozen=True)
class TrainState:
    """The model and its optimiser on this rank.

    wrapped: `model` under DDP; `model` itself under FSDP, and where W = 1. A step calls `wrapped`.
    tower: the text tower where it runs in the loop; None where texts come from sidecars. A trained text tower is part of `model`.
    trunk: the locked trunk where it runs in the loop; None for a trained trunk, and where features come from sidecars.
    beside: files by name that rank 0 saves with every checkpoint.
    """

    model: DualEncoder
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    tower: TextTower | None = None
    trunk: FrozenTrunk | None = None
    beside: dict[str, bytes] = field(default_factory=dict)


class LoadedModel(NamedTuple):
    """A model in host memory, equal on every rank, and the rest of its checkpoint.

    tower: the text tower where it runs in the loop, else None.
    trunk: the locked trunk where it runs in the loop, and on rank 0 where it is saved; else None.
    state: None for a new run.
    moments: the optimiser's tensors, on rank 0; empty on the other ranks, and for a new run.
    rng: the random states of all ranks; empty for a new run.
    """

    model: DualEncoder
    tower: TextTower | None
    trunk: FrozenTrunk | None
    state: CheckpointState | None
    moments: dict[str, Tensor]
    rng: dict[str, Tensor]


def load_model(job: Job, ctx: RankContext, start_step: int) -> LoadedModel:
    """Build the model, with the weights of the checkpoint of `start_step`, or of `train.from`. Every rank calls this.

    Rank 0 alone reads the checkpoint, whose bytes must be verified; it sends the weights to the other ranks, a tensor at a time.
    start_step: 0 for a new run.
    Raises the same error on every rank: ConfigError for a tower that cannot be built, CheckpointError for a checkpoint that
    cannot be read or does not fit the model.
    """

    def build() -> LoadedModel:
        model, tower = build_model(job, replaced=start_step > 0 or job.start_from is not None)
        trunk = load_job_trunk(job) if runs_trunk(job) or (saves_trunk(job) and ctx.rank == 0) else None
        loaded = LoadedModel(model, tower, trunk, None, {}, {})
        if start_step and ctx.rank == 0:
            return read_checkpoint(loaded, checkpoint_location(job.run, start_step), retry_seconds(job.config))
        if job.start_from and ctx.rank == 0:
            load_start(model, job.start_from)
        return loaded

    loaded = on_every_rank(build, "the model", ctx.world)
    if (start_step or job.start_from) and ctx.world > 1:
        broadcast_tensors(loaded.model.state_dict().values(), ctx.device)
    if start_step and ctx.world > 1:
        state, rng = broadcast_object((loaded.state, loaded.rng), ctx.world)
        loaded = loaded._replace(state=state, rng=rng)
    return loaded


def on_every_rank(make: Callable[[], T], what: str, world: int) -> T:
    """The result of `make`, on this rank; where `make` fails on any rank, the same error on every rank. One collective.

    what: that is made, for the message.
    Raises ConfigError for an error that nobody has foreseen: workers that start again would meet it again. An OSError stays as it
    is, since a disk or a network may come back.
    """
    result = error = None
    try:
        result = make()
    except (NevError, OSError) as problem:  # perhaps on this rank alone: the other ranks must not wait for it
        error = problem
    except Exception as problem:  # noqa: BLE001 - timm, transformers and torch raise whatever they do
        traceback.print_exception(problem)  # to the log of this process
        error = ConfigError(
            f"{what} cannot be built from this config: {type(problem).__name__}: {first_line(problem)}. The traceback is in the "
            "worker's log"
        )
    if (first := first_error(error, world)) is not None:
        raise first
    assert result is not None
    return result


def build_model(job: Job, replaced: bool) -> tuple[DualEncoder, TextTower | None]:
    """The model of a job with its first weights, and the text tower where it runs in the loop. No collective.

    replaced: a checkpoint will replace all weights of the vision tower, so neither the hub nor a file of weights is read.
    Raises ConfigError for a tower that cannot be built on this node.
    """
    config = job.config
    tower = load_text(config.text) if config.text_online else None
    if tower and tower.fingerprint != job.fingerprints["text"]:
        raise ConfigError(
            f"text.encoder {config.text.encoder!r}: this node's is not the driver's. Install the same everywhere."
        )
    if config.loss.kernel == "fused" and (
        reason := unsupported_reason(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    ):
        raise ConfigError(f"loss.kernel: fused cannot run on this node: {reason}. Use loss.kernel: tiles.")
    torch.manual_seed(config.seed)
    vision = build_trained_vision(job, replaced)
    apply_train_options(vision, config.train)
    text = make_text_encoder(tower) if tower and config.lock != "text" else None
    if text:
        unlock(text, config.train.activation_checkpointing)
    model = DualEncoder(vision, config.loss, text, config.lock == "image", config.initial_bias).train()
    if config.train.micro_batch is not None or config.train.fsdp:
        refuse_batch_norm(model, "train.fsdp" if config.train.fsdp else "train.micro_batch")
    return model, tower


def build_trained_vision(job: Job, replaced: bool) -> VisionTower | FeatureHead:
    """The vision tower of a job with its first weights; the layers behind a locked trunk, where the trunk is locked."""
    config = job.config
    if job.features:
        place = (config.vision, config.data.image_size, job.features, job.text_width)
        head = build_feature_head(*place, job.statistics)
        if job.head_given and not replaced:
            weights = read_head_weights(*place)
            if weights is None:
                raise ConfigError(
                    f"vision.weights {config.vision.weights}: on this node it has no head that fits, and the driver's has. "
                    "Install the same everywhere."
                )
            head.load_state_dict(weights)
        return head
    settings = config.vision.model_copy(update={"pretrained": False, "weights": None}) if replaced else config.vision
    return build_vision(settings, config.data.image_size, job.text_width)


def runs_trunk(job: Job) -> bool:
    """Whether a locked trunk runs in the loop, on every rank."""
    return job.features is not None and not job.config.vision.from_sidecars


def saves_trunk(job: Job) -> bool:
    """Whether rank 0 saves a locked trunk with every checkpoint."""
    return job.features is not None and job.config.train.save_trunk


def load_job_trunk(job: Job) -> FrozenTrunk:
    """The locked trunk of a job, on the CPU. Raises ConfigError where this node has another one than the driver."""
    return load_same_trunk(job.config.vision, job.config.data.image_size, job.fingerprints["trunk"])


def trunk_to_bytes(trunk: FrozenTrunk) -> bytes:
    """The weights of a locked trunk as safetensors, by timm's names."""
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in trunk.trunk.state_dict().items()})


def retry_seconds(config: Experiment) -> float:
    """How long one read of a checkpoint is retried. The other ranks wait for both reads, up to `workers.timeout_s`."""
    return min(PATIENCE_S, config.workers.timeout_s / 3)


def read_checkpoint(loaded: LoadedModel, location: str, seconds: float) -> LoadedModel:
    """Load the weights of a verified checkpoint into the model, and return the model with the rest of the checkpoint.

    seconds: how long each of the two reads is retried where storage fails.
    Raises CheckpointError; Damaged for a checkpoint that was removed after its verification.
    """
    model = loaded.model
    if checkpoint_step(location) not in list_steps(location.rpartition("/checkpoints/")[0]):
        raise Damaged(f"{location}: removed after it was verified")
    state, weights = with_retries(lambda: checkpoint.load_model(location, verified=True), seconds)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{location}: not the weights of this experiment's model: {error}") from error
    del weights  # before the moments, which are twice as large, are read
    moments, rng = with_retries(lambda: checkpoint.load_training_state(location, verified=True), seconds)
    if unknown := unknown_parameters(model, moments):
        raise CheckpointError(f"{location}: optimiser state of parameters that the model lacks: {unknown[:5]}")
    return loaded._replace(state=state, moments=moments, rng=rng)


def make_train_state(loaded: LoadedModel, job: Job, ctx: RankContext) -> tuple[TrainState, ResumePoint]:
    """The model on this rank's device, under DDP or FSDP, with its optimiser. Every rank calls this. Empties `loaded.moments`."""
    config, model, tower = job.config, loaded.model, loaded.tower
    if (
        tower and config.lock == "text"
    ):  # a trained text tower is the model's: FSDP splits it before it goes to the device
        tower.model.to(ctx.device)
    beside = {}
    if loaded.trunk and saves_trunk(job) and ctx.rank == 0:
        beside[checkpoint.TRUNK_FILE] = trunk_to_bytes(loaded.trunk)
    trunk = loaded.trunk.to(ctx.device) if loaded.trunk and runs_trunk(job) else None
    wrapped = distribute(model, config.train.fsdp, ctx.world, ctx.device)
    optimizer = on_every_rank(partial(make_optimizer, model, config.optim), "the optimiser", ctx.world)
    train_state = TrainState(model, wrapped, optimizer, tower, trunk, beside)
    if loaded.state is None:
        seed_rank(ctx.rank, config.seed, 0)
        return train_state, ResumePoint()
    state = loaded.state
    load_optimizer(model, optimizer, loaded.moments, ctx.world)
    restore_rng(loaded.rng, ctx.rank, ctx.device, config.seed, state.step)
    return train_state, ResumePoint(state.step, state.bad_rows, state.history)
