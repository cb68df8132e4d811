"""Steps that go wrong: a step without a finite loss and gradient changes nothing; a loss far above its past is reported.

No step waits for the device here: losses are read when metrics are logged. Every rank sees the same numbers, those of the
global batch, so all ranks skip, report and stop at the same step.
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
from nev.config.train import Guards
from nev.data.block_plan import BlockPlan
from nev.storage.files import StorageError, join, storage_errors_as, write_atomic
from nev.train.core.step import StepResult

WINDOW = 1000  # steps over which skipped ones are counted
MEMORY = 100  # losses over which the running mean and variance average; no loss is a spike before there were as many
LEAST_DEVIATION = 0.01  # of the mean: where the loss hardly moves, a small ripple is no spike
SHARDS_NAMED = 5  # in an error message


class Diverged(NevError, RuntimeError):
    """Too many steps had no finite loss and gradient (`guards.max_skipped`)."""


@dataclass(frozen=True)
class GuardState:
    """What the guards remember of a run. Every checkpoint has it, so a resumed run judges as an undisturbed run.

    skipped: the steps among the last 1,000 that were skipped.
    skips: number of skipped steps since the run's first step.
    mean, variance: of the losses, exponentially weighted.
    spikes: number of spikes since the run's first step.
    losses: number of finite losses since the run's first step.
    """

    skipped: tuple[int, ...] = ()
    skips: int = 0
    spikes: int = 0
    mean: float = 0.0
    variance: float = 0.0
    losses: int = 0


@dataclass(frozen=True)
class BadStep:
    """A step that went wrong.

    kind: "skipped" or "spike".
    epochs: the epoch of each set.
    blocks: first and last block of the step.
    loss, grad_norm: None where the value is not finite, which JSON cannot hold.
    usual_loss: the running mean of the losses before the step.
    shards: paths of the shards that the rows of the step came from, over all ranks.
    """

    kind: str
    step: int
    epochs: tuple[int, ...]
    blocks: tuple[int, int]
    learning_rate: float
    loss: float | None
    grad_norm: float | None
    usual_loss: float
    shards: tuple[str, ...]


def judge(
    history: GuardState, step: int, loss: float, grad_norm: float, sigmas: float | None
) -> tuple[GuardState, str | None]:
    """The state after a step, and the kind of a bad step: "skipped", "spike", or None for a good step.

    sigmas: a loss above the mean by more than so many standard deviations is a spike; None for no spikes. A low loss is none.
    """
    skipped = tuple(earlier for earlier in history.skipped if earlier > step - WINDOW)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return replace(history, skipped=(*skipped, step), skips=history.skips + 1), "skipped"
    deviation = max(math.sqrt(history.variance), LEAST_DEVIATION * abs(history.mean))
    bound = history.mean + (sigmas or math.inf) * deviation
    spike = history.losses >= MEMORY and loss > bound
    clipped = min(loss, bound) if history.losses >= MEMORY else loss  # a spike in the mean would hide the next spike
    weight = 1 / min(history.losses + 1, MEMORY)
    off = clipped - history.mean
    after = replace(
        history,
        skipped=skipped,
        spikes=history.spikes + spike,
        mean=history.mean + weight * off,
        variance=(1 - weight) * (history.variance + weight * off**2),
        losses=history.losses + 1,
    )
    return after, "spike" if spike else None


class StepGuard:
    """Records the steps of a rank, and finds those that went wrong.

    history: the state after the steps that were checked.
    """

    def __init__(
        self, config: Guards, plan: BlockPlan, shards: tuple[str, ...], history: GuardState, world: int
    ) -> None:
        self.history = history
        self._world = world
        self._config, self._plan, self._shards = config, plan, shards
        self._steps: list[tuple[int, float]] = []
        self._results: list[Tensor] = []
        self._shards_by_step: dict[int, set[int]] = {}

    def record_shards(self, step: int, shards: Iterable[int]) -> None:
        """Record the shards, by number, that this rank's rows of a step came from."""
        self._shards_by_step.setdefault(step, set()).update(map(int, shards))

    def record(self, step: int, rate: float, result: StepResult) -> None:
        """Record the loss and the gradient norm of a step. They stay on the device."""
        self._steps.append((step, rate))
        self._results.append(torch.stack([result.loss.double(), result.grad_norm.double()]))

    def check(self) -> list[BadStep]:
        """The bad steps since the last call. Every rank calls this, and gets the same. It waits for the device."""
        if not self._results:
            return []
        bad = []
        for (step, rate), (loss, norm) in zip(self._steps, torch.stack(self._results).tolist(), strict=True):
            usual = self.history.mean
            self.history, kind = judge(self.history, step, loss, norm, self._config.spike_sigmas)
            if kind:
                bad.append((kind, step, rate, loss, norm, usual))
        shards = self._gather_shards([step for _, step, *_ in bad]) if bad else {}
        bad_steps = [
            BadStep(
                kind=kind,
                step=step,
                epochs=tuple(map(int, self._plan.epochs_done(step))),
                blocks=(self._plan.step_blocks(step).start, self._plan.step_blocks(step).stop - 1),
                learning_rate=rate,
                loss=loss if math.isfinite(loss) else None,
                grad_norm=norm if math.isfinite(norm) else None,
                usual_loss=usual,
                shards=shards[step],
            )
            for kind, step, rate, loss, norm, usual in bad
        ]
        self._steps, self._results, self._shards_by_step = [], [], {}
        return bad_steps

    def _gather_shards(self, steps: list[int]) -> dict[int, tuple[str, ...]]:
        """The paths of the shards of each step, over all ranks. One collective."""
        ranks = gather_objects({step: self._shards_by_step.get(step, set()) for step in steps}, self._world)
        shards = {step: sorted(set().union(*(rank[step] for rank in ranks))) for step in steps}
        return {step: tuple(self._shards[shard] for shard in shards[step]) for step in steps}


def refuse_divergence(history: GuardState, bad_steps: list[BadStep], config: Guards) -> None:
    """Raise Diverged where more than `guards.max_skipped` of the last 1,000 steps were skipped.

    bad_steps: of the latest check. Every rank raises at the same step, before its checkpoint.
    """
    last = next((bad for bad in reversed(bad_steps) if bad.kind == "skipped"), None)
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


def describe_bad_step(bad: BadStep, run: str) -> str:
    """A bad step as a line for the console."""
    first, last = bad.blocks
    what = (
        "no finite loss and gradient, the step is skipped"
        if bad.kind == "skipped"
        else f"loss {bad.loss:.4g}, usual {bad.usual_loss:.4g}"
    )
    return (
        f"step {bad.step}: {what} (epoch {', '.join(map(str, bad.epochs))}, blocks {first} to {last}, learning rate "
        f"{bad.learning_rate:.3g}; shards in {join(run, 'guards')})"
    )


def write_bad_steps(bad_steps: list[BadStep], run: str) -> None:
    """Write bad steps to `<run>/guards/step-00001234.json`, one file a step, so a repeated step overwrites its file.

    A file that storage refuses is left out, since the console has the same: it must not end the run.
    """
    for bad in bad_steps:
        location = join(run, "guards", f"step-{bad.step:08d}.json")
        with suppress(StorageError), storage_errors_as(location, "written"):
            write_atomic(location, json.dumps(asdict(bad), indent=1).encode())
