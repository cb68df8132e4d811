"""Known failures of training towards a text tower, recognised in a run's metrics. No Ray, no MLflow.

arXiv 2406.18587 and the papers before it name these failures: pictures that never find their captions, a loss that stays flat,
a logit scale at its bound, vectors that fall together, a trained text tower that drifts.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

from nev.config.experiment import Experiment

FLAT_POINTS = 30  # logged losses, after the warm-up, that all have to be flat
FLAT_SHARE = 0.01  # of the loss of guessing: a loss less than that below the loss of guessing is flat
BOUND_POINTS = 30  # logged scales in a row that have to be at the bound
COLLAPSE = 0.95  # mean cosine of two different pictures
CHANCE_TIMES = 1.5  # odds up to so many times those of guessing are at chance
DRIFT = 0.1  # 1 - mean cosine between the vectors of sentences now and before training


class Alert(NamedTuple):
    """One sign of failure.

    name: of the failure, for a tag.
    text: what was seen, and what to do.
    """

    name: str
    text: str


class FailureAlerts:
    """Checks the metrics of a run, and returns each sign of failure once."""

    def __init__(self, config: Experiment) -> None:
        self._warm = config.optim.warmup_steps
        self._bound = config.loss.max_scale if config.loss.learn_scale else None
        self._guess = guessing_loss(config)
        self._losses: deque[float] = deque(maxlen=FLAT_POINTS)
        self._at_bound = 0
        self._raised: set[str] = set()

    def check(self, step: int, metrics: dict[str, float]) -> list[Alert]:
        """The new signs in the metrics of a step."""
        signs = [non_finite(metrics), drift(metrics)]
        if step > self._warm:
            signs += [self._loss(metrics), self._scale(metrics), *at_chance(metrics), collapse(metrics)]
        new = {sign.name: sign for sign in signs if sign and sign.name not in self._raised}
        self._raised |= new.keys()
        return list(new.values())

    def _loss(self, metrics: dict[str, float]) -> Alert | None:
        loss = metrics.get("loss")
        if loss is None:
            return None
        self._losses.append(loss)
        if self._guess is None or len(self._losses) < FLAT_POINTS or min(self._losses) < (1 - FLAT_SHARE) * self._guess:
            return None
        return Alert(
            "flat_loss",
            f"the loss is {loss:.3f}, as flat as that of guessing, {self._guess:.3f}. Look whether captions fit their pictures, "
            "or raise optim.lr.",
        )

    def _scale(self, metrics: dict[str, float]) -> Alert | None:
        if self._bound is None or "logit_scale" not in metrics:
            return None
        self._at_bound = self._at_bound + 1 if metrics["logit_scale"] >= 0.999 * self._bound else 0
        if self._at_bound < BOUND_POINTS:
            return None
        return Alert(
            "scale_at_bound",
            f"the logit scale stays at its bound, {self._bound:g}. Captions that are nearly alike want more: look for "
            "doubles, or raise loss.max_scale.",
        )


def guessing_loss(config: Experiment) -> float | None:
    """The loss of a model that guesses: log B for softmax; None for the sigmoid loss and for several widths."""
    plain = config.loss.kind == "softmax" and not config.loss.matryoshka
    return math.log(config.train.global_batch) if plain else None


def non_finite(metrics: dict[str, float]) -> Alert | None:
    """Steps that were skipped without a finite loss and gradient (`nev.train.worker.guards`), or a loss that is not finite."""
    skipped = metrics.get("skipped_steps", 0.0)
    if not skipped and math.isfinite(metrics.get("loss", 0.0)):
        return None
    return Alert(
        "non_finite",
        f"the loss is not finite, and {skipped:,.0f} steps were skipped for it. Lower optim.lr, or raise optim.warmup_steps.",
    )


def at_chance(metrics: dict[str, float]) -> list[Alert]:
    """Search or zero-shot that is no better than guessing, after a validation."""
    judged = {
        "search_at_chance": ("retrieval/text_to_image/r10", "retrieval/text_to_image/r10_chance"),
        "zero_shot_at_chance": ("zero_shot/top1", "zero_shot/chance"),
    }
    return [
        Alert(sign, f"{name} is {metrics[name]:.2%}, where guessing has {metrics[chance]:.2%}.")
        for sign, (name, chance) in judged.items()
        if name in metrics and odds(metrics[name]) <= CHANCE_TIMES * odds(metrics[chance]) < math.inf
    ]


def odds(share: float) -> float:
    """p / (1 - p). Among few candidates guessing has a large share p, and no model can have 1.5 p."""
    return share / (1 - share) if share < 1 else math.inf


def collapse(metrics: dict[str, float]) -> Alert | None:
    """Pictures whose vectors are all alike, after a validation."""
    cosine = metrics.get("space/anisotropy_images", 0.0)
    if cosine <= COLLAPSE:
        return None
    return Alert(
        "collapse", f"any two pictures have a cosine of {cosine:.3f}. Lower optim.lr, or begin with other weights."
    )


def drift(metrics: dict[str, float]) -> Alert | None:
    """A trained text tower that no longer fits the vectors made before."""
    moved = metrics.get("space/text_drift", 0.0)
    if moved <= DRIFT:
        return None
    return Alert(
        "text_drift", f"sentences have moved by {moved:.3f} (1 - cosine): vectors made before do not fit any more."
    )
