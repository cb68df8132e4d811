"""The steps in a row: take the blocks that the plan names, update, report, validate, keep. No Ray in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from nev.config import Experiment
from nev.data.block import Block
from nev.errors import NevError
from nev.eval.validation import Result, Validation, embedder, kept_bytes, kept_file, validate
from nev.models.text import TextTower, weight_digests
from nev.models.text_encoder import encoder_of
from nev.models.vision import normalise
from nev.train import checkpoint, guards
from nev.train.job import Job, Start
from nev.train.learner import Learner, Rank
from nev.train.manifest import State, prune
from nev.train.meter import Clock, Totals
from nev.train.optim import learning_rate, set_learning_rate
from nev.train.parallel import first_of_all
from nev.train.quarantine import Quarantine, TooManyBadRows, describe, too_many
from nev.train.rng import gather_rng
from nev.train.step import Batch, train_step
from nev.train.tower import uncompiled


class Report(Protocol):
    """Takes metrics of a step, and lines for the person who watches."""

    def __call__(self, step: int, metrics: dict[str, float], notes: Sequence[str] = ()) -> None: ...  # noqa: D102


class TowerMoved(NevError, RuntimeError):
    """A locked tower is not what it was when this process began, on one rank at least."""


class StreamError(RuntimeError):
    """The stream gave other rows than the plan names for this step."""


def train(job: Job, me: Rank, learner: Learner, start: Start, blocks: Iterator[Block], report: Report) -> None:
    """Train from `start.step` to `job.stop_step`, writing checkpoints under `job.run`.

    `report` is called on rank 0 alone. Raises StreamError when a block is not the one that the plan names, TooManyBadRows past
    `data.max_bad_share`, and Diverged past `guards.max_skipped`.
    """
    config, plan, batch_rows = job.config, job.plan, job.config.train.global_batch
    quarantine = Quarantine(job.run, job.shards, me.rank, start.step)
    totals = Totals(me.device, start.bad_rows)
    watch = guards.Watch(config.guards, plan, job.shards, guards.History(**start.history))
    clock = Clock(start.step)
    held = {name: (tower, weight_digests(tower)) for name, tower in locked_towers(learner, config).items()}
    locked_text = locked_encoder(learner.tower, config) if learner.tower and config.lock == "text" else None
    for step in range(start.step, job.stop_step):
        rate = learning_rate(step, job.total_steps, config.optim)
        set_learning_rate(learner.optimizer, rate)
        filling = Filling(plan.rank_blocks(step, me.rank, me.world), plan.block_rows, me.device)
        for number in filling.numbers:
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
        last = done == job.stop_step
        score = last or (config.train.eval_every is not None and done % config.train.eval_every == 0)
        save = score or done % config.train.checkpoint_every == 0
        if done % config.train.log_every == 0 or save:
            metrics = totals.metrics(result, learner.model, rate) | clock.metrics(done, batch_rows)
            found = watch.look()
            if too_many(totals.bad_rows(), done, plan, config):
                raise TooManyBadRows(describe(quarantine, totals.bad_rows(), done, config))
            if me.rank == 0:
                guards.write(found, job.run)
                counts = {"skipped_steps": watch.history.skips, "loss_spikes": watch.history.spikes}
                metrics |= {name: float(count) for name, count in counts.items() if count}
                report(done, metrics, [guards.told(one, job.run) for one in found])
            guards.refuse_divergence(watch.history, found, config.guards)
        if save:
            with clock.paused():
                refuse_moved(held, me.world)
                quarantine.flush(done)
                reasons = quarantine.metrics()
                if reasons and me.rank == 0:
                    report(done, reasons)
                scored = validate_model(job.validation, me, learner, config) if score and job.validation else None
                if scored:
                    report(done, scored.metrics)
                keep(job, me, learner, Start(done, totals.bad_rows(), asdict(watch.history)), scored)


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


def keep(job: Job, me: Rank, learner: Learner, at: Start, scored: Result | None) -> None:
    """Write a checkpoint (rank 0 does; the others give what they alone have), then drop those that are not kept."""
    rng = gather_rng(me.device, me.world)
    tensors = checkpoint.gather_tensors(learner.model, learner.optimizer, keep=me.rank == 0)
    if me.rank != 0:
        return
    state = State(
        step=at.step,
        config=job.config.model_dump(mode="json"),
        fingerprints=job.fingerprints,
        mlflow_run_id=job.mlflow_run_id,
        metrics=scored.metrics if scored else {},
        world_size=me.world,
        bad_rows=at.bad_rows,
        history=at.history,
    )
    beside = {kept_file(job.validation): kept_bytes(job.validation, scored)} if scored and job.validation else {}
    checkpoint.save(job.run, state, tensors, rng, beside)
    prune(job.run, job.config.train.keep_last, job.config.eval.best)


def locked_encoder(tower: TextTower, config: Experiment) -> Callable[[Tensor], Tensor]:
    """Tokens [b, T] to vectors, float16 [b, D] as sidecars hold them, a micro-batch at a time."""
    encoder = encoder_of(tower)

    def encode(tokens: Tensor) -> Tensor:
        rows = config.train.micro_batch or len(tokens)
        with torch.no_grad():
            return torch.cat([encoder(tokens[at : at + rows]).half() for at in range(0, len(tokens), rows)])

    return encode


def validate_model(task: Validation, me: Rank, learner: Learner, config: Experiment) -> Result | None:
    """Score the model as it stands: eval mode, no graph, then back to training mode."""
    model = learner.model
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
            return validate(task, embed, encode, me.rank, me.world, lockstep=config.train.fsdp)
    finally:
        model.train()


def next_block(blocks: Iterator[Block], expected: int) -> Block:
    """The next block of the stream, checked to be block `expected` of the plan."""
    block = next(blocks, None)
    if block is None:
        raise StreamError(f"the stream ended before block {expected}")
    if not (block["block"] == expected).all():
        raise StreamError(f"the stream gave block {int(block['block'][0])} where the plan says {expected}")
    return block


class Filling:
    """A rank's batch on its way: block after block is copied into (pinned) host memory, then all to another device."""

    def __init__(self, numbers: Sequence[int], block_rows: int, device: torch.device) -> None:
        self.numbers = numbers
        self._block_rows, self._device = block_rows, device
        self._host: dict[str, Tensor] = {}
        self._filled = 0

    def add(self, block: Block) -> None:
        """Copy the next block of `numbers`; nothing of it is kept."""
        place = slice(self._filled, self._filled + self._block_rows)
        for name in ("image", "text", "valid"):
            column = block[name]
            if name not in self._host:
                shape = (len(self.numbers) * self._block_rows, *column.shape[1:])
                dtype = torch.from_numpy(np.empty(0, column.dtype)).dtype
                self._host[name] = torch.empty(shape, dtype=dtype, pin_memory=self._device.type == "cuda")
            np.copyto(self._host[name].numpy()[place], column)
        self._filled = place.stop

    def batch(self) -> Batch:
        """The batch on the device. Of tokens as many columns as its longest text has, one at least."""
        text = self._host["text"]
        if not text.is_floating_point():
            used = text[:, : max(1, int((text >= 0).sum(1).amax()))]
            self._host["text"] = used.pin_memory() if self._device.type == "cuda" else used.contiguous()
        return Batch(*(self._host[name].to(self._device, non_blocking=True) for name in ("image", "text", "valid")))
