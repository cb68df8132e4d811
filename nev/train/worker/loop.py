"""The loop over steps: take the blocks that the plan names, update, log, validate, save. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from nev.common.collectives import first_error
from nev.common.errors import NevError
from nev.config.experiment import Experiment
from nev.data.block import Block
from nev.eval.validation.task import Result
from nev.eval.validation.validate import validate
from nev.inference.forward import forward_rows, make_embedder
from nev.models.digests import weight_digests
from nev.models.frozen import FrozenTrunk
from nev.models.lock import CANARIES
from nev.models.text import TextTower, make_text_encoder
from nev.models.vision import as_input
from nev.train.core.optim import set_learning_rate
from nev.train.core.schedule import learning_rate
from nev.train.core.step import Batch, train_step
from nev.train.core.vision_setup import uncompiled
from nev.train.job import Job, ResumePoint
from nev.train.messages import Report
from nev.train.worker import guards
from nev.train.worker.batch import BatchBuilder, next_block
from nev.train.worker.checkpointer import Checkpointer
from nev.train.worker.collectives import StopConsensus
from nev.train.worker.meters import Interval, StepClock, Totals
from nev.train.worker.profiler import StepProfiler
from nev.train.worker.quarantine import Quarantine, TooManyBadRows, describe_bad_rows, too_many_bad_rows
from nev.train.worker.set_meters import SetMeters
from nev.train.worker.state import RankContext, TrainState


class TowerMoved(NevError, RuntimeError):
    """The weights of a locked tower have changed since this process started, on one rank at least."""


def train(
    job: Job,
    ctx: RankContext,
    train_state: TrainState,
    start: ResumePoint,
    blocks: Iterator[Block],
    report: Report,
    local_stop: Callable[[], bool] = lambda: False,
    export: Callable[[Interval], None] = lambda interval: None,
) -> int:
    """Train from `start.step` to `job.stop_step`, writing checkpoints under `job.run`. Returns the number of steps done.

    blocks: this rank's share of the stream.
    report: called on rank 0 alone.
    local_stop: whether this rank received a stop request. If any did, all finish the step, save a checkpoint and return.
    export: called on every rank after the steps that are logged.
    Raises StreamError where a block is not the block that the plan names, TooManyBadRows past `data.max_bad_share`, Diverged past
    `guards.max_skipped`, and TowerMoved where a locked tower has changed.
    """
    config, plan, batch_rows = job.config, job.plan, job.config.train.global_batch
    quarantine = Quarantine(job.run, job.shards, ctx.rank, start.step, ctx.world, job.set_names)
    totals = Totals(ctx.device, start.bad_rows)
    set_meters = SetMeters(job.set_names, plan, ctx.device, ctx.world)
    guard = guards.StepGuard(config.guards, plan, job.shards, guards.GuardState(**start.history), ctx.world)
    clock = StepClock(start.step)
    consensus = StopConsensus(ctx.world, local_stop, config.workers.timeout_s)
    locked = {name: (tower, weight_digests(tower)) for name, tower in locked_towers(train_state, config).items()}
    encode_text = (
        make_locked_encoder(train_state.tower, config) if train_state.tower and config.lock == "text" else None
    )
    add_features = make_trunk_encoder(train_state.trunk, config, ctx.device) if train_state.trunk else None
    max_blocks = plan.max_rank_blocks(ctx.world)
    with StepProfiler(job, ctx, report) as profiler, Checkpointer(job, ctx, start.step, report) as checkpointer:
        for step in range(start.step, job.stop_step):
            if profiler.profiles(step + 1):
                profiler.synchronize()
                with clock.paused("profile"):
                    profiler.begin(step + 1)
            rate = learning_rate(step, job.total_steps, config.optim)
            set_learning_rate(train_state.optimizer, rate)
            block_numbers = plan.rank_blocks(step, ctx.rank, ctx.world, start.step, config.data.streams)
            builder = BatchBuilder(max_blocks, plan.block_rows, ctx.device)
            for number in block_numbers:
                with clock.waiting():
                    block = next_block(blocks, number)
                quarantine.note(step, block)
                guard.record_shards(step, np.unique(block["shard"]))
                builder.add(block)
                clock.add_rows(len(block["valid"]))
                del block  # frees its memory in the object store
            batch = builder.batch()
            if encode_text:
                batch = batch._replace(text=encode_text(batch.text))
            if add_features:
                batch = add_features(batch)
            result = train_step(train_state.wrapped, train_state.optimizer, batch, config, ctx.precision)
            totals.add(result, batch_rows)
            set_meters.add(batch, result)
            guard.record(step, rate, result)
            done = step + 1
            stop = consensus.should_stop()
            if profiler.profiles(done):
                profiler.synchronize()
                with clock.paused("profile"):
                    profiler.end(done, last=stop or done == job.stop_step)
            save_now = (
                job.validates(done)
                or done in (job.stop_step, job.decay_start)
                or stop
                or done % config.train.checkpoint_every == 0
            )
            if done % config.train.log_every == 0 or save_now:
                metrics = totals.metrics(result, train_state.model, rate) | clock.metrics(done, batch_rows)
                metrics |= set_meters.metrics(done)
                bad_steps = guard.check()
                if ctx.rank == 0:
                    guards.write_bad_steps(bad_steps, job.run)
                counts = {"skipped_steps": guard.history.skips, "loss_spikes": guard.history.spikes}
                metrics |= {name: float(count) for name, count in counts.items() if count}
                checkpointer.log(done, metrics, [guards.describe_bad_step(bad, job.run) for bad in bad_steps])
                # The metrics and the bad steps come first: they show why the run ends.
                if too_many_bad_rows(totals.bad_rows(), done, plan, config):
                    raise TooManyBadRows(describe_bad_rows(quarantine, totals.bad_rows(), done, config))
                guards.refuse_divergence(guard.history, bad_steps, config.guards)
            if save_now:
                scored = None
                with clock.paused("checkpoint"):
                    refuse_moved(locked, ctx.world)
                    quarantine.flush(done)
                    if reasons := quarantine.metrics():
                        checkpointer.log(done, reasons)
                if job.validates(done) and not config.eval.asynchronous:
                    with clock.paused("validation"):
                        scored = validate_model(job, ctx, train_state)
                with clock.paused("checkpoint"):
                    if scored:
                        checkpointer.log(done, scored.metrics)
                    checkpointer.save(train_state, done, totals.bad_rows(), guard.history, scored)
            if done % config.train.log_every == 0 or save_now:
                export(clock.take())
            if stop:
                return done
    return job.stop_step


def locked_towers(train_state: TrainState, config: Experiment) -> dict[str, nn.Module]:
    """The locked towers of this process, by name. What comes from sidecars is computed by none of them: the driver checks it."""
    if config.lock == "image":
        return {"vision tower": train_state.model.vision}
    towers: dict[str, nn.Module] = {"trunk": train_state.trunk.trunk} if train_state.trunk else {}
    return towers | ({"text tower": train_state.tower.model} if config.lock == "text" and train_state.tower else {})


def refuse_moved(locked: dict[str, tuple[nn.Module, dict[str, str]]], world: int) -> None:
    """Raise TowerMoved on every rank where the weights of a locked tower have changed on any rank.

    locked: by name, a tower and the digests of its weights at the start.
    One collective for each tower, none where W = 1.
    """
    for name, (tower, before) in locked.items():
        now = weight_digests(tower)
        changed = [key for key, digest in before.items() if now[key] != digest]
        problem = f"{len(changed)} of its {len(before)} weights changed ({', '.join(changed[:3])})" if changed else None
        if problem := first_error(problem, world):
            raise TowerMoved(
                f"the {name} is locked, but {problem} since this process started. The change was not saved: "
                "the same command continues from the last checkpoint."
            )


def make_locked_encoder(tower: TextTower, config: Experiment) -> Callable[[Tensor], Tensor]:
    """A function from tokens, int32 [b, T], to vectors, float16 [b, D] as in sidecars; a micro-batch at a time, no gradient."""
    encoder = make_text_encoder(tower)

    def encode(tokens: Tensor) -> Tensor:
        rows = config.train.micro_batch or len(tokens)
        with torch.no_grad():
            return torch.cat([encoder(tokens[at : at + rows]).half() for at in range(0, len(tokens), rows)])

    return encode


def make_trunk_encoder(trunk: FrozenTrunk, config: Experiment, device: torch.device) -> Callable[[Batch], Batch]:
    """A function that replaces the pictures of a batch by their features, float16 [b, ...], as sidecars have them.

    A part of the pictures at a time passes the trunk, without a graph. A row with a feature beyond float16 becomes invalid.
    """
    rows = min(forward_rows(device), config.eval.batch)

    def encode(batch: Batch) -> Batch:
        parts = torch.split(batch.images, rows)
        features = torch.cat([trunk(as_input(part, config.data.mean, config.data.std)) for part in parts])
        valid = batch.valid & features.isfinite().flatten(1).all(1)
        features.masked_fill_(~valid.view(-1, *[1] * (features.ndim - 1)), 0)
        return batch._replace(images=features, valid=valid)

    return encode


def validate_model(job: Job, ctx: RankContext, train_state: TrainState) -> Result | None:
    """Validate the model in eval mode. Every rank calls this. Returns the result on rank 0, None on the other ranks.

    Where the text tower is trained, the metrics have space/text_drift: 1 - mean cosine between the canary sentences' vectors
    now and before training.
    """
    model, config = train_state.model, job.config
    assert job.validation
    # Rank 0 scores. Where FSDP has split the text tower, every rank embeds the texts with rank 0.
    encode = train_state.tower.encode if train_state.tower and (ctx.rank == 0 or model.text) else None

    def forward(images: Tensor) -> Tensor:
        images = train_state.trunk(images) if train_state.trunk else images
        with ctx.precision.autocast():
            vectors: Tensor = model.vision(images)
        return vectors

    model.eval()
    try:
        # A forward of FSDP is a collective: one for each block, whatever the number of its pictures.
        rows = config.eval.batch if config.train.fsdp else None
        embed = make_embedder(forward, config.data.mean, config.data.std, ctx.device, rows)
        with uncompiled():
            scale = float(model.log_scale.detach().exp())
            drift = None  # comes first: rank 0 scores last, and no rank waits for that
            if job.canaries is not None and encode and (ctx.rank == 0 or config.train.fsdp):
                drift = 1 - float(np.einsum("cd,cd->c", encode(CANARIES), job.canaries).mean())
            scored = validate(job.validation, embed, scale, encode, ctx.rank, ctx.world, lockstep=config.train.fsdp)
            if scored and drift is not None:
                scored.metrics["space/text_drift"] = drift
            return scored
    finally:
        model.train()
