"""What is trained, on this rank: the model and its optimiser, from the seed or from the run's latest checkpoint. No Ray in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nev.config.base import ConfigError
from nev.losses.fused import unsupported_reason
from nev.models.dual_encoder import DualEncoder
from nev.models.text import TextTower, load_text, make_text_encoder
from nev.models.text_encoder import unlock
from nev.models.vision import build_vision
from nev.runs import checkpoint
from nev.runs.manifest import CheckpointError, CheckpointState, latest_valid, with_retries
from nev.train.core.gradcache import refuse_batch_norm
from nev.train.core.optim import make_optimizer
from nev.train.core.parallel import distribute
from nev.train.core.rng import restore_rng, seed_rank
from nev.train.core.state_dict import load_optimizer, unknown_parameters
from nev.train.core.step import Precision
from nev.train.core.vision_setup import apply_train_options
from nev.train.job import Job, ResumePoint


@dataclass(frozen=True)
class RankContext:
    """This process among the W."""

    rank: int
    world: int
    device: torch.device
    precision: Precision


@dataclass(frozen=True)
class TrainState:
    """What is trained: `wrapped` is `model` itself (alone, or under FSDP), or DDP around it.

    tower: the text tower where it runs in the loop; one that is trained is the model's own.
    """

    model: DualEncoder
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    tower: TextTower | None = None


class LoadedModel(NamedTuple):
    """A model on the host, alike on every rank, and what its checkpoint holds beside the weights, if it comes from one."""

    model: DualEncoder
    tower: TextTower | None
    state: CheckpointState | None
    moments: dict[str, Tensor]
    rng: dict[str, Tensor]


def load_model(job: Job) -> LoadedModel:
    """Build the model that the job trains, and read its checkpoint. It speaks to no other rank.

    Raises ConfigError for a tower that cannot be built, CheckpointError for a checkpoint that cannot be read or does not fit.
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
    found = with_retries(lambda: latest_valid(job.run, checkpoint.load))
    source = config.vision
    if found is not None:  # its weights replace all: neither hub nor file is needed
        source = source.model_copy(update={"pretrained": False, "weights": None})
    vision = build_vision(source, config.data.image_size, job.text_width)
    apply_train_options(vision, config.train)
    text = make_text_encoder(tower) if tower and config.lock != "text" else None
    if text:
        unlock(text, config.train.activation_checkpointing)
    model = DualEncoder(vision, config.loss, text, vision_locked=config.lock == "image").train()
    if config.train.micro_batch is not None or config.train.fsdp:
        refuse_batch_norm(model, "train.fsdp" if config.train.fsdp else "train.micro_batch")
    if found is None:
        return LoadedModel(model, tower, None, {}, {})
    state, weights, moments, rng = found.read
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{found.location}: not the weights of this experiment's model: {error}") from error
    if unknown := unknown_parameters(model, moments):
        raise CheckpointError(f"{found.location}: optimiser state of parameters that the model lacks: {unknown[:5]}")
    return LoadedModel(model, tower, state, moments, rng)


def make_train_state(built: LoadedModel, job: Job, ctx: RankContext) -> tuple[TrainState, ResumePoint]:
    """The model on this rank's device, under DDP or FSDP, with its optimiser: every rank must come here."""
    config, model, tower = job.config, built.model, built.tower
    if tower and config.lock == "text":  # else it is the model's, and may be split before it goes there
        tower.model.to(ctx.device)
    wrapped = distribute(model, config.train.fsdp, ctx.world, ctx.device)
    optimizer = make_optimizer(model, config.optim)
    if built.state is None:
        seed_rank(ctx.rank, config.seed, 0)
        return TrainState(model, wrapped, optimizer, tower), ResumePoint()
    state = built.state
    load_optimizer(model, optimizer, built.moments)
    restore_rng(built.rng, ctx.rank, ctx.device, config.seed, state.step)
    return TrainState(model, wrapped, optimizer, tower), ResumePoint(state.step, state.bad_rows, state.history)
