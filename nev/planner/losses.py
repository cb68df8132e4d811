"""What the loss of nodes costs: the best checkpoint period (Young 1974, Daly 2006), and the share of the work that counts."""

from __future__ import annotations

import math


def mean_time_between_losses(nodes: int, losses_hour: float) -> float:
    """Seconds between two losses of a group. losses_hour: of a node, an hour. Infinite without losses."""
    return 3600 / (nodes * losses_hour) if losses_hour else math.inf


def best_period(checkpoint_s: float, mtbl_s: float) -> float:
    """Seconds of work between two checkpoints that lose the least: Daly's higher-order estimate.

    checkpoint_s: time that a checkpoint takes from training.
    mtbl_s: mean time between losses. The estimate holds for checkpoint_s < 2 mtbl_s; past that it is mtbl_s itself.
    """
    if math.isinf(mtbl_s):
        return math.inf
    if checkpoint_s >= 2 * mtbl_s:
        return mtbl_s
    ratio = math.sqrt(checkpoint_s / (2 * mtbl_s))
    return math.sqrt(2 * checkpoint_s * mtbl_s) * (1 + ratio / 3 + ratio**2 / 9) - checkpoint_s


def goodput(period_s: float, checkpoint_s: float, mtbl_s: float, restart_s: float) -> float:
    """Share of a run's time that is work which counts, where losses come at random (exponential times between them).

    period_s: work between two checkpoints.
    restart_s: from a loss to the next step, without losses meanwhile.
    Daly's exact expectation: a period of work takes M exp(R/M) (exp((period + checkpoint) / M) - 1).
    """
    if math.isinf(mtbl_s):
        return period_s / (period_s + checkpoint_s)
    exponent = (period_s + checkpoint_s) / mtbl_s
    if exponent + restart_s / mtbl_s > 700:  # no period ends any more
        return 0.0
    return period_s / (mtbl_s * math.exp(restart_s / mtbl_s) * math.expm1(exponent))
