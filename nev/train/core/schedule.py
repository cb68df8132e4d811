"""The learning rate as a pure function of the step: linear warm-up, then cosine, constant, or constant with a decay (WSD)."""

from __future__ import annotations

import math

from nev.config.base import ConfigError
from nev.config.train import Optim

DECAY_SHARE = 0.2  # of a run; Hägele et al. 2024 find 10 to 20 % enough


def learning_rate(step: int, total_steps: int, config: Optim) -> float:
    """The learning rate of a step, counted from 0: linear up to `lr` over `warmup_steps`, then by `schedule`.

    total_steps: the step at which the schedules "cosine" and "wsd" reach `final_lr`.
    The decay of "wsd" is `1 - sqrt` (Hägele et al. 2024, arXiv 2405.18392).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    start = decay_start(total_steps, config)
    if start is None or step < start:
        return config.lr
    progress = min(1.0, (step - start) / max(1, total_steps - start))
    share = 1 - math.sqrt(progress) if config.schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_lr + (config.lr - config.final_lr) * share


def decay_start(total_steps: int, config: Optim) -> int | None:
    """The first step whose learning rate may be below `lr` after the warm-up; None for a constant rate."""
    if config.schedule == "constant":
        return None
    if config.schedule == "cosine":
        return config.warmup_steps
    return max(config.warmup_steps, total_steps - _decay_steps(total_steps, config))


def _decay_steps(total_steps: int, config: Optim) -> int:
    """Length of the decay of "wsd", in steps."""
    return max(1, round(DECAY_SHARE * total_steps)) if config.decay_steps is None else config.decay_steps


def check_schedule(total_steps: int, config: Optim) -> None:
    """Raise ConfigError for a run that is too short for its warm-up and its decay."""
    decay = _decay_steps(total_steps, config)
    if config.schedule == "wsd" and config.warmup_steps + decay > total_steps:
        raise ConfigError(
            f"optim.warmup_steps ({config.warmup_steps:,}) and optim.decay_steps ({decay:,}) are more than the {total_steps:,} "
            "steps of the run: lower them, or train longer"
        )


def first_changed_step(steps: int, before: tuple[int, Optim], now: tuple[int, Optim]) -> int | None:
    """The first of `steps` steps whose learning rate differs between two schedules; None where all agree.

    before, now: the length of the run in steps, and its optimiser.
    """
    return next((step for step in range(steps) if learning_rate(step, *before) != learning_rate(step, *now)), None)
