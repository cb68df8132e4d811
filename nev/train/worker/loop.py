"""The steps in a row: take the blocks that the plan names, update, report, validate, keep. No Ray in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from nev.common.errors import NevError
from nev.config.experiment import Experiment
from nev.data.block import Block
from nev.embed.images import embedder
from nev.eval.validation.task import Result
from nev.eval.validation.validate import validate
from nev.models.lock import CANARIES
from nev.models.text import TextTower, encoder_of, weight_digests
from nev.models.vision import normalise
from nev.train.core.optim import learning_rate, set_learning_rate
from nev.train.core.step import train_step
from nev.train.core.vision_setup import uncompiled
from nev.train.job import Job, Start
from nev.train.worker import guards
from nev.train.worker.batch import Filling, next_block
from nev.train.worker.checkpointer import Keeper, Report
from nev.train.worker.collectives import Agreement, first_of_all
from nev.train.worker.meters import Clock, Totals
from nev.train.worker.quarantine import Quarantine, TooManyBadRows, describe, too_many
from nev.train.worker.state import Learner, Rank


class TowerMoved(NevError, RuntimeError):
    """A locked tower is not what it was when this process began, on one rank at least."""


def train(
    job: Job,
    me: Rank,
    learner: Learner,
    start: Start,
    blocks: Iterator[Block],
    report: Report,
    asked: Callable[[], bool] = lambda: False,
) -> int:
    """Train from `start.step` to `job.stop_step`, writing checkpoints under `job.run`. Returns the step that it came to.

    That is an earlier one where `asked` told any rank that it must leave: a checkpoint of it is written then.
    `report` is called on rank 0 alone. Raises StreamError when a block is not the one that the plan names, TooManyBadRows past
    `data.max_bad_share`, and Diverged past `guards.max_skipped`.
    """
    config, plan, batch_rows = job.config, job.plan, job.config.train.global_batch
    quarantine = Quarantine(job.run, job.shards, me.rank, start.step)
    totals = Totals(me.device, start.bad_rows)
    watch = guards.Watch(config.guards, plan, job.shards, guards.History(**start.history))
    clock = Clock(start.step)
    leaving = Agreement(me.world, asked, config.workers.timeout_s)
    held = {name: (tower, weight_digests(tower)) for name, tower in locked_towers(learner, config).items()}
    locked_text = locked_encoder(learner.tower, config) if learner.tower and config.lock == "text" else None
    room = plan.rank_room(me.world)
    with Keeper(job, me, start.step, report) as keeper:
        for step in range(start.step, job.stop_step):
            rate = learning_rate(step, job.total_steps, config.optim)
            set_learning_rate(learner.optimizer, rate)
            numbers = plan.rank_blocks(step, me.rank, me.world, since=start.step)
            filling = Filling(numbers, room, plan.block_rows, me.device)
            for number in numbers:
                with clock.waiting():
                    block = next_block(blocks, number)
                quarantine.note(step, block)
                watch.read(step, np.unique(block["shard"]))
                filling.add(block)
                del block  # its memory in the object store is free now
            batch = filling.batch()
            if locked_text:
                batch = batch._replace(text=locked_text(batch.text))
            result = train_step(learner.wrapped, learner.optimizer, batch, config, me.precision)
            totals.add(result, batch_rows)
            watch.note(step, rate, result)
            done = step + 1
            leave = leaving.reached()
            save = job.validates(done) or done == job.stop_step or leave or done % config.train.checkpoint_every == 0
            if done % config.train.log_every == 0 or save:
                metrics = totals.metrics(result, learner.model, rate) | clock.metrics(done, batch_rows)
                found = watch.look()
                if too_many(totals.bad_rows(), done, plan, config):
                    raise TooManyBadRows(describe(quarantine, totals.bad_rows(), done, config))
                if me.rank == 0:
                    guards.write(found, job.run)
                counts = {"skipped_steps": watch.history.skips, "loss_spikes": watch.history.spikes}
                metrics |= {name: float(count) for name, count in counts.items() if count}
                keeper.say(done, metrics, [guards.told(one, job.run) for one in found])
                guards.refuse_divergence(watch.history, found, config.guards)
            if save:
                with clock.paused():
                    refuse_moved(held, me.world)
                    quarantine.flush(done)
                    if reasons := quarantine.metrics():
                        keeper.say(done, reasons)
                    scored = None
                    if job.validates(done) and not config.eval.asynchronous:
                        scored = validate_model(job, me, learner)
                    if scored:
                        keeper.say(done, scored.metrics)
                    keeper.keep(learner, done, totals.bad_rows(), watch.history, scored)
            if leave:
                return done
    return job.stop_step


def locked_towers(learner: Learner, config: Experiment) -> dict[str, nn.Module]:
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
        if found := first_of_all(problem, world):
            raise TowerMoved(
                f"the {name} tower is locked, but {found} since this process began. Nothing of it was kept: the same command "
                "goes on from the checkpoint before."
            )


def locked_encoder(tower: TextTower, config: Experiment) -> Callable[[Tensor], Tensor]:
    """Tokens [b, T] to vectors, float16 [b, D] as sidecars hold them, a micro-batch at a time."""
    encoder = encoder_of(tower)

    def encode(tokens: Tensor) -> Tensor:
        rows = config.train.micro_batch or len(tokens)
        with torch.no_grad():
            return torch.cat([encoder(tokens[at : at + rows]).half() for at in range(0, len(tokens), rows)])

    return encode


def validate_model(job: Job, me: Rank, learner: Learner) -> Result | None:
    """Score the model as it stands: eval mode, no graph, then back to training mode.

    Where the text tower is trained, the metrics have space/text_drift: 1 - mean cosine of what sentences are to it now, and were
    before. The result is rank 0's.
    """
    model, config = learner.model, job.config
    assert job.validation
    # Rank 0 scores; the others embed the texts with it where FSDP has split the tower.
    encode = learner.tower.encode if learner.tower and (me.rank == 0 or model.text) else None

    def forward(pixels: Tensor) -> Tensor:
        with me.precision.autocast():
            vectors: Tensor = model.vision(pixels)
        return vectors

    model.eval()
    try:
        embed = embedder(forward, lambda images: normalise(images, config.data.mean, config.data.std), me.device)
        with uncompiled():
            scored = validate(job.validation, embed, encode, me.rank, me.world, lockstep=config.train.fsdp)
            if job.canaries is not None and encode and (me.rank == 0 or config.train.fsdp):
                moved = 1 - float(np.einsum("cd,cd->c", encode(CANARIES), job.canaries).mean())
                if scored:
                    scored.metrics["space/text_drift"] = moved
            return scored
    finally:
        model.train()
