"""Steps that go wrong: one without a finite loss and gradient changes nothing, and a loss far above its past is told.

A step never waits for the device here: what steps gave is read where a line is logged. Every rank sees the same numbers,
those of the global batch, so that all skip, tell and stop alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from nev.common.collectives import gather_objects
from nev.common.errors import NevError
from nev.config.experiment import Guards
from nev.data.plan import Plan
from nev.storage.files import StorageError, join, storage_errors_as, write_atomic
from nev.train.core.step import StepResult

WINDOW = 1000  # steps over which skipped ones are counted
MEMORY = 100  # losses that the running mean and variance look back on, and how many they need before they judge
LEAST_DEVIATION = 0.01  # of the mean: a loss that hardly moves must not make every ripple a spike
SHARDS_NAMED = 5


class Diverged(NevError, RuntimeError):
    """Too many steps had no finite loss and gradient."""


@dataclass(frozen=True)
class GuardState:
    """What a run has seen of itself; with every checkpoint, so that a resumed run judges as an undisturbed one.

    skipped: those of the last 1,000 steps that were skipped; skips, spikes: all so far. mean, variance: of the losses,
    exponentially weighted; losses: how many there were.
    """

    skipped: tuple[int, ...] = ()
    skips: int = 0
    spikes: int = 0
    mean: float = 0.0
    variance: float = 0.0
    losses: int = 0


@dataclass(frozen=True)
class BadStep:
    """A step that went wrong. loss, grad_norm: as JSON has them, None for one that is no number."""

    kind: str
    step: int
    epoch: int
    blocks: tuple[int, int]
    learning_rate: float
    loss: float | None
    grad_norm: float | None
    usual_loss: float
    shards: tuple[str, ...]


def judge(
    history: GuardState, step: int, loss: float, grad_norm: float, sigmas: float | None
) -> tuple[GuardState, str | None]:
    """The history with this step in it, and "skipped", "spike" or None. Only a loss *above* its past is a spike."""
    kept = tuple(one for one in history.skipped if one > step - WINDOW)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return replace(history, skipped=(*kept, step), skips=history.skips + 1), "skipped"
    deviation = max(math.sqrt(history.variance), LEAST_DEVIATION * abs(history.mean))
    bound = history.mean + (sigmas or math.inf) * deviation
    spike = history.losses >= MEMORY and loss > bound
    seen = min(loss, bound) if history.losses >= MEMORY else loss  # or the first spike would hide the next
    weight = 1 / min(history.losses + 1, MEMORY)
    off = seen - history.mean
    after = replace(
        history,
        skipped=kept,
        spikes=history.spikes + spike,
        mean=history.mean + weight * off,
        variance=(1 - weight) * (history.variance + weight * off**2),
        losses=history.losses + 1,
    )
    return after, "spike" if spike else None


class StepGuard:
    """One rank's notes of the steps since it last looked."""

    def __init__(self, config: Guards, plan: Plan, shards: tuple[str, ...], history: GuardState, world: int) -> None:
        self.history = history
        self._world = world
        self._config, self._plan, self._shards = config, plan, shards
        self._steps: list[tuple[int, float]] = []
        self._results: list[Tensor] = []
        self._own: dict[int, set[int]] = {}

    def record_shards(self, step: int, shards: Iterable[int]) -> None:
        """Note the shards (numbers) that rows of this rank's share of a step came from."""
        self._own.setdefault(step, set()).update(map(int, shards))

    def record(self, step: int, rate: float, result: StepResult) -> None:
        """Note what a step gave, on the device."""
        self._steps.append((step, rate))
        self._results.append(torch.stack([result.loss.double(), result.grad_norm.double()]))

    def check(self) -> list[BadStep]:
        """What went wrong since the last look, the same on every rank: all call this together. It waits for the device."""
        if not self._results:
            return []
        found = []
        for (step, rate), (loss, norm) in zip(self._steps, torch.stack(self._results).tolist(), strict=True):
            usual = self.history.mean
            self.history, kind = judge(self.history, step, loss, norm, self._config.spike_sigmas)
            if kind:
                found.append((kind, step, rate, loss, norm, usual))
        shards = self._shards_of([step for _, step, *_ in found]) if found else {}
        findings = [
            BadStep(
                kind=kind,
                step=step,
                epoch=self._plan.epoch_of(self._plan.step_blocks(step).start),
                blocks=(self._plan.step_blocks(step).start, self._plan.step_blocks(step).stop - 1),
                learning_rate=rate,
                loss=loss if math.isfinite(loss) else None,
                grad_norm=norm if math.isfinite(norm) else None,
                usual_loss=usual,
                shards=shards[step],
            )
            for kind, step, rate, loss, norm, usual in found
        ]
        self._steps, self._results, self._own = [], [], {}
        return findings

    def _shards_of(self, steps: list[int]) -> dict[int, tuple[str, ...]]:
        mine = {step: self._own.get(step, set()) for step in steps}
        ranks = gather_objects(mine, self._world)
        shards = {step: sorted(set().union(*(rank[step] for rank in ranks))) for step in steps}
        return {step: tuple(self._shards[shard] for shard in shards[step]) for step in steps}


def refuse_divergence(history: GuardState, findings: list[BadStep], config: Guards) -> None:
    """Raise Diverged past `guards.max_skipped`: the same on every rank, and before a checkpoint."""
    last = next((one for one in reversed(findings) if one.kind == "skipped"), None)
    if last is None or len(history.skipped) <= config.max_skipped:
        return
    steps = ", ".join(map(str, history.skipped))
    more = f" and {len(last.shards) - SHARDS_NAMED} more" if len(last.shards) > SHARDS_NAMED else ""
    raise Diverged(
        f"{len(history.skipped)} of the last {WINDOW:,} steps had no finite loss and gradient and were skipped, more than "
        f"guards.max_skipped = {config.max_skipped}: steps {steps}. The last at learning rate {last.learning_rate:.3g}, loss "
        f"{last.loss}, gradient norm {last.grad_norm}, with rows of {', '.join(last.shards[:SHARDS_NAMED])}{more}. Start anew "
        "under another name with a lower optim.lr, a longer optim.warmup_steps or optim.clip_norm set."
    )


def describe_bad_step(finding: BadStep, run: str) -> str:
    """A finding as a line for the console."""
    first, last = finding.blocks
    what = (
        "no finite loss and gradient, the step is skipped"
        if finding.kind == "skipped"
        else f"loss {finding.loss:.4g}, usual {finding.usual_loss:.4g}"
    )
    return (
        f"step {finding.step}: {what} (epoch {finding.epoch}, blocks {first} to {last}, learning rate "
        f"{finding.learning_rate:.3g}; shards in {join(run, 'guards')})"
    )


def write_bad_steps(findings: list[BadStep], run: str) -> None:
    """Write findings to `<run>/guards/step-00001234.json`, one file a step, so that a repeated step overwrites itself.

    Storage that refuses one does not end the run: what was found is on the console, too.
    """
    for finding in findings:
        location = join(run, "guards", f"step-{finding.step:08d}.json")
        with suppress(StorageError), storage_errors_as(location, "written"):
            write_atomic(location, json.dumps(asdict(finding), indent=1).encode())
