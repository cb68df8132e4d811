"""The steps in a row: take the blocks that the plan names, update, report, validate, keep. No Ray in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from nev.common.collectives import first_error
from nev.common.errors import NevError
from nev.config.experiment import Experiment
from nev.data.block import Block
from nev.embed.images import make_embedder
from nev.eval.validation.task import Result
from nev.eval.validation.validate import validate
from nev.models.lock import CANARIES
from nev.models.text import TextTower, make_text_encoder, weight_digests
from nev.models.vision import normalise
from nev.train.core.optim import learning_rate, set_learning_rate
from nev.train.core.step import train_step
from nev.train.core.vision_setup import uncompiled
from nev.train.job import Job, ResumePoint
from nev.train.messages import Report
from nev.train.worker import guards
from nev.train.worker.batch import BatchBuilder, next_block
from nev.train.worker.checkpointer import Checkpointer
from nev.train.worker.collectives import StopConsensus
from nev.train.worker.meters import StepClock, Totals
from nev.train.worker.quarantine import Quarantine, TooManyBadRows, describe_bad_rows, too_many_bad_rows
from nev.train.worker.state import RankContext, TrainState


class TowerMoved(NevError, RuntimeError):
    """A locked tower is not what it was when this process began, on one rank at least."""


def train(
    job: Job,
    ctx: RankContext,
    learner: TrainState,
    start: ResumePoint,
    blocks: Iterator[Block],
    report: Report,
    local_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Train from `start.step` to `job.stop_step`, writing checkpoints under `job.run`. Returns the step that it came to.

    That is an earlier one where `local_stop` told any rank that it must leave: a checkpoint of it is written then.
    `report` is called on rank 0 alone. Raises StreamError when a block is not the one that the plan names, TooManyBadRows past
    `data.max_bad_share`, and Diverged past `guards.max_skipped`.
    """
    config, plan, batch_rows = job.config, job.plan, job.config.train.global_batch
    quarantine = Quarantine(job.run, job.shards, ctx.rank, start.step, ctx.world)
    totals = Totals(ctx.device, start.bad_rows)
    guard = guards.StepGuard(config.guards, plan, job.shards, guards.GuardState(**start.history), ctx.world)
    clock = StepClock(start.step)
    consensus = StopConsensus(ctx.world, local_stop, config.workers.timeout_s)
    held = {name: (tower, weight_digests(tower)) for name, tower in locked_towers(learner, config).items()}
    locked_text = locked_encoder(learner.tower, config) if learner.tower and config.lock == "text" else None
    room = plan.max_rank_blocks(ctx.world)
    with Checkpointer(job, ctx, start.step, report) as checkpointer:
        for step in range(start.step, job.stop_step):
            rate = learning_rate(step, job.total_steps, config.optim)
            set_learning_rate(learner.optimizer, rate)
            numbers = plan.rank_blocks(step, ctx.rank, ctx.world, first_step=start.step)
            filling = BatchBuilder(numbers, room, plan.block_rows, ctx.device)
            for number in numbers:
                with clock.waiting():
                    block = next_block(blocks, number)
                quarantine.note(step, block)
                guard.record_shards(step, np.unique(block["shard"]))
                filling.add(block)
                del block  # its memory in the object store is free now
            batch = filling.batch()
            if locked_text:
                batch = batch._replace(text=locked_text(batch.text))
            result = train_step(learner.wrapped, learner.optimizer, batch, config, ctx.precision)
            totals.add(result, batch_rows)
            guard.record(step, rate, result)
            done = step + 1
            leave = consensus.should_stop()
            save = job.validates(done) or done == job.stop_step or leave or done % config.train.checkpoint_every == 0
            if done % config.train.log_every == 0 or save:
                metrics = totals.metrics(result, learner.model, rate) | clock.metrics(done, batch_rows)
                found = guard.check()
                if ctx.rank == 0:
                    guards.write_bad_steps(found, job.run)
                counts = {"skipped_steps": guard.history.skips, "loss_spikes": guard.history.spikes}
                metrics |= {name: float(count) for name, count in counts.items() if count}
                checkpointer.log(done, metrics, [guards.describe_bad_step(one, job.run) for one in found])
                # After the metrics and the bad steps, which show why the run ends.
                if too_many_bad_rows(totals.bad_rows(), done, plan, config):
                    raise TooManyBadRows(describe_bad_rows(quarantine, totals.bad_rows(), done, config))
                guards.refuse_divergence(guard.history, found, config.guards)
            if save:
                with clock.paused():
                    refuse_moved(held, ctx.world)
                    quarantine.flush(done)
                    if reasons := quarantine.metrics():
                        checkpointer.log(done, reasons)
                    scored = None
                    if job.validates(done) and not config.eval.asynchronous:
                        scored = validate_model(job, ctx, learner)
                    if scored:
                        checkpointer.log(done, scored.metrics)
                    checkpointer.save(learner, done, totals.bad_rows(), guard.history, scored)
            if leave:
                return done
    return job.stop_step


def locked_towers(learner: TrainState, config: Experiment) -> dict[str, nn.Module]:
    """The towers that this process holds and must not move; texts from sidecars have theirs on the driver."""
    if config.lock == "image":
        return {"vision": learner.model.vision}
    return {"text": learner.tower.model} if config.lock == "text" and learner.tower else {}


def refuse_moved(held: dict[str, tuple[nn.Module, dict[str, str]]], world: int) -> None:
    """Raise TowerMoved on every rank unless the weights have the digests that they had, on each: before a checkpoint.

    One gather of objects where a tower is held and W > 1.
    """
    for name, (tower, before) in held.items():
        now = weight_digests(tower)
        moved = [key for key, digest in before.items() if now[key] != digest]
        problem = f"{len(moved)} of its {len(before)} weights changed ({', '.join(moved[:3])})" if moved else None
        if found := first_error(problem, world):
            raise TowerMoved(
                f"the {name} tower is locked, but {found} since this process began. Nothing of it was kept: the same command "
                "goes on from the checkpoint before."
            )


def locked_encoder(tower: TextTower, config: Experiment) -> Callable[[Tensor], Tensor]:
    """Tokens [b, T] to vectors, float16 [b, D] as sidecars hold them, a micro-batch at a time."""
    encoder = make_text_encoder(tower)

    def encode(tokens: Tensor) -> Tensor:
        rows = config.train.micro_batch or len(tokens)
        with torch.no_grad():
            return torch.cat([encoder(tokens[at : at + rows]).half() for at in range(0, len(tokens), rows)])

    return encode


def validate_model(job: Job, ctx: RankContext, learner: TrainState) -> Result | None:
    """Score the model as it stands: eval mode, no graph, then back to training mode.

    Where the text tower is trained, the metrics have space/text_drift: 1 - mean cosine of what sentences are to it now, and were
    before. The result is rank 0's.
    """
    model, config = learner.model, job.config
    assert job.validation
    # Rank 0 scores; the others embed the texts with it where FSDP has split the tower.
    encode = learner.tower.encode if learner.tower and (ctx.rank == 0 or model.text) else None

    def forward(pixels: Tensor) -> Tensor:
        with ctx.precision.autocast():
            vectors: Tensor = model.vision(pixels)
        return vectors

    model.eval()
    try:
        embed = make_embedder(forward, lambda images: normalise(images, config.data.mean, config.data.std), ctx.device)
        with uncompiled():
            scale = float(model.log_scale.detach().exp())
            scored = validate(job.validation, embed, scale, encode, ctx.rank, ctx.world, lockstep=config.train.fsdp)
            if job.canaries is not None and encode and (ctx.rank == 0 or config.train.fsdp):
                moved = 1 - float(np.einsum("cd,cd->c", encode(CANARIES), job.canaries).mean())
                if scored:
                    scored.metrics["space/text_drift"] = moved
            return scored
    finally:
        model.train()
