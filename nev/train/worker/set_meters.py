"""What a mixture's sets have of a run: the loss of each, and its epochs."""

from __future__ import annotations

import torch
import torch.distributed as dist

from nev.data.block_plan import BlockPlan
from nev.train.core.step import Batch, StepResult


class SetMeters:
    """The mean loss of each set's pairs, over all ranks and the steps since the last call of `metrics`. Without sets, nothing.

    names: of the sets.
    """

    def __init__(self, names: tuple[str, ...], plan: BlockPlan, device: torch.device, world: int) -> None:
        self._names, self._plan, self._world = names, plan, world
        self._sums = torch.zeros(2, len(names), dtype=torch.float64, device=device)

    def add(self, batch: Batch, result: StepResult) -> None:
        """Add the terms of this rank's pairs in a step. Pairs without a finite term are left out."""
        if batch.sets is None:
            return
        counted = batch.valid & result.terms.isfinite()
        terms = torch.stack([torch.where(counted, result.terms, 0).double(), counted.double()])
        self._sums.index_add_(1, batch.sets, terms)

    def metrics(self, step: int) -> dict[str, float]:
        """`sets/NAME/loss` and `sets/NAME/epochs` after `step` steps. Every rank calls this: one collective for a mixture."""
        if not self._names:
            return {}
        if self._world > 1:
            dist.all_reduce(self._sums)
        losses, counts = self._sums.tolist()
        self._sums.zero_()
        means = {f"sets/{name}/loss": losses[at] / counts[at] for at, name in enumerate(self._names) if counts[at]}
        epochs = zip(self._names, self._plan.epochs_done(step), strict=True)
        return means | {f"sets/{name}/epochs": done for name, done in epochs}
