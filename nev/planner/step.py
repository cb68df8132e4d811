"""Time of a step: computation of a rank, the wait for the slowest rank, and the collectives that are not hidden."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nev.planner.network import Fabric, Message, exposed_s

BACKWARD = 2 / 3  # share of a step's computation: a backward has twice the FLOPs of a forward


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, before data limits.

    compute: of a rank.
    straggler: wait for the slowest rank.
    communication: wait for collectives.
    """

    compute: float
    straggler: float
    communication: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.compute + self.straggler + self.communication


def straggler_share(deviation: float, world: int) -> float:
    """By how much the slowest of W ranks is slower than the mean, as a share: the largest of W normal draws is near
    sqrt(2 ln W) deviations above their mean.
    """
    return deviation * math.sqrt(2 * math.log(world))


def compute_s(local: int, part: int, images_s: float, launch_s: float, update_s: float) -> float:
    """Seconds of a rank's computation.

    local: images of a rank, embedded `part` at a time.
    images_s: rate at which a part is large enough to fill the GPU.
    launch_s: least time of a part, that of launching its kernels.
    update_s: time of the optimiser.
    """
    whole, rest = divmod(local, part)
    return sum(count * max(size / images_s, launch_s) for count, size in ((whole, part), (bool(rest), rest))) + update_s


def step_time(compute: float, messages: Sequence[Message], world: int, fabric: Fabric, deviation: float) -> StepTime:
    """The time of a step of W ranks.

    compute: seconds of a rank.
    deviation: of a rank's compute time, as a share.
    """
    waiting = exposed_s(messages, world, fabric, BACKWARD * compute)
    return StepTime(compute, compute * straggler_share(deviation, world), waiting)


def compute_from_step(
    step_s: float, messages: Sequence[Message], world: int, fabric: Fabric, deviation: float
) -> float:
    """The seconds of computation of a rank for which `step_time` gives a measured `step_s`.

    Raises ValueError where the collectives alone would take as long.
    """
    low, high = 0.0, step_s
    if step_time(1e-9 * step_s, messages, world, fabric, deviation).total >= step_s:
        raise ValueError(f"a step of {step_s:.3g} s is shorter than its collectives on this hardware")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if step_time(middle, messages, world, fabric, deviation).total < step_s else (low, middle)
        )
    return high
