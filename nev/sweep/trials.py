"""From a sweep to its trials: every arm with every seed as a whole experiment, under a name that says what it is.

A trial's name ends in a digest of its settings. So a sweep that is started again finds its finished trials, and one whose base,
budget or data has changed begins others instead of taking those for its own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.file import parse, read_config
from nev.sweep.config import LR_RULE, Settings, Sweep, make_labels

LABEL_CHARACTERS = 80
DIGITS = 8  # of a digest, in a name
TRIES = 20  # a draw that was drawn before is drawn anew
RULES = ("constant", "sqrt", "linear")

# What a trial may be run again with, and be the same one: it does not touch what comes out. Of locations the content counts.
NOT_ITS_OWN: dict[str, Any] = {
    **dict.fromkeys(("name", "output", "tracking", "workers", "guards"), True),
    "data": {"train", "val", "max_bad_share"},
    "vision": {"weights"},
    "train": {
        "micro_batch",
        "activation_checkpointing",
        "compile",
        "fsdp",
        "log_every",
        "checkpoint_every",
        "keep_last",
    },
    "eval": {"batch": True, "asynchronous": True, "zero_shot": {"classes"}},
}
# What the sweep sets, by the names that it has there.
SET_BY_SWEEP = {
    "seed": "seeds",
    **dict.fromkeys(("train.samples", "train.steps", "train.epochs"), "samples"),
    "eval.patience": "asha",
}
CONTENT_COUNTS = ("data.train", "data.val", "vision.weights", "eval.zero_shot.classes")

Arm = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Trial:
    """An arm (axis and value or label, in the order of the axes) with one seed, and the experiment that it is."""

    arm: Arm
    seed: int
    experiment: Experiment

    @property
    def name(self) -> str:
        """The name of its run. Two arms that come to the same settings are one run."""
        return self.experiment.name


def plan_trials(sweep: Sweep, overrides: list[str]) -> list[Trial]:
    """All arms with all seeds, every experiment validated before the first one runs; arms in order, seeds innermost.

    overrides: `section.key=value`, over the sweep's own. Raises ConfigError.
    """
    raw = read_config(sweep.base)
    fixed = [*_assignments(sweep.overrides), *overrides]
    refuse_keys(sweep, [assignment.partition("=")[0] for assignment in fixed])
    base = load_base(sweep, overrides)
    if sweep.asha and not base.train.eval_every:
        raise ConfigError(f"{sweep.base}: asha judges trials at their validations: set train.eval_every in overrides")
    budget = {"train.epochs": None, "train.steps": None, "train.samples": sweep.samples, "eval.patience": None}
    trials = []
    for arm, settings in expand_arms(sweep):
        where = f"{sweep.base} at {', '.join(f'{axis} = {value}' for axis, value in arm)}"
        rule = settings.pop(LR_RULE, sweep.lr_rule)
        if rule not in RULES:
            raise ConfigError(f"{where}: there is {', '.join(RULES)}, not {LR_RULE} {rule!r}")
        chosen = {**settings, **budget}
        own = parse(Experiment, raw, [*fixed, *_assignments(chosen)], where=where)
        chosen |= scale_lr(base, own, rule)
        for seed in sweep.seeds:
            trial = parse(Experiment, raw, [*fixed, *_assignments({**chosen, "seed": seed})], where=where)
            if trial.optim.warmup_steps >= (steps := compute_steps(trial)):
                raise ConfigError(
                    f"{where}: optim.warmup_steps = {trial.optim.warmup_steps}, and its {sweep.samples:,} samples are {steps} "
                    "steps: lower it in overrides, or raise samples"
                )
            trials.append(Trial(arm, seed, trial))
    return trials


def load_base(sweep: Sweep, overrides: list[str]) -> Experiment:
    """The experiment that all trials start from. Raises ConfigError."""
    fixed = [*_assignments(sweep.overrides), *overrides]
    return parse(Experiment, read_config(sweep.base), fixed, where=sweep.base)


def refuse_keys(sweep: Sweep, overridden: Sequence[str]) -> None:
    """Raise ConfigError for a setting that is the sweep's own, or is varied and makes no other trial."""
    varied = [*sweep.axes, *sweep.search]
    for arms in sweep.axes.values():
        varied += [key for settings in (arms.values() if isinstance(arms, dict) else ()) for key in settings]
    for key in (*varied, *overridden):
        if name := SET_BY_SWEEP.get(key):
            raise ConfigError(f"{key}: a sweep sets this itself, by its own `{name}` (--sweep {name}=...)")
    for key in varied:
        section, _, rest = key.partition(".")
        free = NOT_ITS_OWN.get(section)
        if free is True or (free and rest in free and key not in CONTENT_COUNTS):
            raise ConfigError(
                f"{key}: a trial comes to the same whatever this is, so it cannot be varied; overrides may set it"
            )


def compute_steps(experiment: Experiment) -> int:
    """The steps of a trial: its samples, rounded up to whole ones."""
    return math.ceil((experiment.train.samples or 0) / experiment.train.global_batch)


def expand_arms(sweep: Sweep) -> Iterator[tuple[Arm, Settings]]:
    """Every combination of the axes, with every draw of the search, and what it sets."""
    axes = [
        [(axis, label, _settings(axis, values, place)) for place, label in enumerate(make_labels(values))]
        for axis, values in sweep.axes.items()
    ]
    for drawn in draw_settings(sweep):
        for point in itertools.product(*axes):
            arm = [(axis, label) for axis, label, _ in point] + [(key, str(value)) for key, value in drawn.items()]
            settings: Settings = {}
            for _, _, own in point:
                settings |= own
            yield tuple(arm), {**settings, **drawn}


def draw_settings(sweep: Sweep) -> list[Settings]:
    """The draws of the search, the same at every start: a trial that is gone on with must be the one that was begun.

    Raises ConfigError where there are not so many different ones.
    """
    if not sweep.search:
        return [{}]
    from ray import tune

    random = np.random.default_rng(0)
    domains = {}
    for key, draw in sweep.search.items():
        (kind,) = draw.model_fields_set
        ends = getattr(draw, kind)
        domains[key] = tune.choice(list(ends)) if kind == "choice" else getattr(tune, kind)(*ends)
    found: list[Settings] = []
    for _ in range(TRIES * (sweep.draws or 0)):
        drawn = {key: _plain(domain.sample(random_state=random)) for key, domain in domains.items()}
        if drawn not in found:
            found.append(drawn)
        if len(found) == sweep.draws:
            return found
    raise ConfigError(f"draws = {sweep.draws}: the search has {len(found)} different settings; lower it")


def scale_lr(base: Experiment, own: Experiment, rule: str) -> Settings:
    """Rates of `own` by a rule at another batch size than the base's, and warm-up and validations after as many samples as
    there, to the nearest step and one at least.
    """
    ratio = own.train.global_batch / base.train.global_batch
    factor = {"constant": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[rule]
    found: Settings = {"optim.lr": own.optim.lr * factor, "optim.final_lr": own.optim.final_lr * factor}
    if own.optim.warmup_steps:
        found["optim.warmup_steps"] = max(1, round(own.optim.warmup_steps / ratio))
    if own.train.eval_every:
        found["train.eval_every"] = max(1, round(own.train.eval_every / ratio))
    return found


def name_trials(sweep: Sweep, trials: Sequence[Trial], data: Sequence[str]) -> list[Trial]:
    """The trials with the names of their runs: the sweep, the arm as far as a name can tell, the seed, and a digest of all that
    makes the trial what it is. data: what tells each one's sets and classes from others.
    """
    names: dict[str, str] = {}
    found = []
    for trial, own in zip(trials, data, strict=True):
        digest = hash_trial(trial.experiment, own)
        label = "-".join(f"{axis.rpartition('.')[2]}_{value}" for axis, value in trial.arm)
        label = re.sub(r"[^A-Za-z0-9._-]+", "_", label)[:LABEL_CHARACTERS]
        name = names.setdefault(digest, f"{sweep.name}-{label}-seed_{trial.seed}-{digest[:DIGITS]}")
        found.append(replace(trial, experiment=trial.experiment.model_copy(update={"name": name})))
    return found


def hash_trial(experiment: Experiment, data: str) -> str:
    """sha256 of what makes a trial what it is: its settings, its data, and the weights that it begins with."""
    content = experiment.model_dump(mode="json", exclude=NOT_ITS_OWN)
    if given := experiment.vision.weights:
        file = Path(given).expanduser()
        content["weights"] = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else given
    return hashlib.sha256(json.dumps([content, data], sort_keys=True).encode()).hexdigest()


def hash_definition(sweep: Sweep, trials: Sequence[Trial]) -> str:
    """sha256 of what a sweep asks, and of which trials: another budget, base or metric is another sweep."""
    content = [
        sweep.model_dump(mode="json", exclude={"concurrent", "base", "overrides"}),
        [trial.name for trial in trials],
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def find_reference(sweep: Sweep) -> Arm:
    """The arm that the others are compared with; of a search there is none, and its first draw stands in."""
    chosen = {axis: str(sweep.reference.get(axis, make_labels(values)[0])) for axis, values in sweep.axes.items()}
    return next(arm for arm, _ in expand_arms(sweep) if all(chosen.get(axis, value) == value for axis, value in arm))


def _settings(axis: str, values: tuple[Any, ...] | dict[str, Settings], place: int) -> Settings:
    return {axis: values[place]} if isinstance(values, tuple) else dict(list(values.values())[place])


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _assignments(settings: Settings) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]  # JSON is YAML, and keeps null and lists
