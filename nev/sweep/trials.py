"""From a sweep to its trials: every arm with every seed, as a complete experiment with a name.

The name of a trial ends in a digest of its settings and data. So a sweep that is started again finds its finished trials, and a
sweep whose base, budget or data has changed starts new trials.
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
from nev.inference.checkpoints import choose_checkpoint
from nev.runs.manifest import read_manifest
from nev.sweep.config import LR_RULE, Settings, Sweep, make_labels

LABEL_CHARACTERS = 80
DIGEST_DIGITS = 8  # of a digest in a name
TRIES = 20  # attempts at a draw that is different from earlier draws
RULES = ("constant", "sqrt", "linear")

# Settings that do not change the result of a trial, so that they are not part of its digest. Of locations the content is hashed.
IRRELEVANT_SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("name", "output", "tracking", "workers", "guards"), True),
    "data": {"train", "val", "streams", "max_bad_share"},
    "vision": {"weights"},
    "train": {
        "from_",
        "micro_batch",
        "activation_checkpointing",
        "compile",
        "fsdp",
        "log_every",
        "checkpoint_every",
        "keep_last",
        "profile",
    },
    "eval": {"batch": True, "asynchronous": True, "zero_shot": {"classes"}},
}
# Settings of an experiment that the sweep sets, with the sweep's names for them.
SET_BY_SWEEP = {
    "seed": "seeds",
    **dict.fromkeys(("train.samples", "train.steps", "train.epochs"), "samples"),
    "eval.patience": "asha",
}
HASHED_BY_CONTENT = ("data.train", "data.val", "vision.weights", "eval.zero_shot.classes")

Arm = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Trial:
    """One training run of a sweep.

    arm: pairs of axis and value or label, in the order of the axes.
    seed: of the experiment.
    experiment: the complete settings.
    """

    arm: Arm
    seed: int
    experiment: Experiment

    @property
    def name(self) -> str:
        """Name of the run. Two arms with the same settings are one run."""
        return self.experiment.name


def plan_trials(sweep: Sweep, overrides: list[str]) -> list[Trial]:
    """All arms with all seeds: the arms in order, and for each arm its seeds. Every experiment is validated.

    overrides: `section.key=value`, applied after the overrides of the sweep. Raises ConfigError.
    """
    raw = read_config(sweep.base)
    fixed = [*_assignments(sweep.overrides), *overrides]
    refuse_keys(sweep, [assignment.partition("=")[0] for assignment in fixed])
    base = load_base(sweep, overrides)
    if sweep.asha and not base.train.eval_every:
        raise ConfigError(f"{sweep.base}: asha compares trials at their validations: set train.eval_every in overrides")
    budget = {"train.epochs": None, "train.steps": None, "train.samples": sweep.samples, "eval.patience": None}
    trials = []
    for arm, settings in expand_arms(sweep):
        where = f"{sweep.base} at {', '.join(f'{axis} = {value}' for axis, value in arm)}"
        rule = settings.pop(LR_RULE, sweep.lr_rule)
        if rule not in RULES:
            raise ConfigError(f"{where}: there is {', '.join(RULES)}, not {LR_RULE} {rule!r}")
        chosen = {**settings, **budget}
        experiment = parse(Experiment, raw, [*fixed, *_assignments(chosen)], where=where)
        chosen |= scale_lr(base, experiment, rule)
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
    """Raise ConfigError for a setting that only the sweep may set, and for an axis that does not change a trial's result."""
    varied = [*sweep.axes, *sweep.search]
    for arms in sweep.axes.values():
        varied += [key for settings in (arms.values() if isinstance(arms, dict) else ()) for key in settings]
    for key in (*varied, *overridden):
        if name := SET_BY_SWEEP.get(key):
            raise ConfigError(f"{key}: the sweep sets this by `{name}` (--sweep {name}=...)")
    for key in varied:
        section, _, rest = key.partition(".")
        free = IRRELEVANT_SETTINGS.get(section)
        if free is True or (free and rest in free and key not in HASHED_BY_CONTENT):
            raise ConfigError(
                f"{key}: this setting does not change the result of a trial, so it cannot be varied; overrides may set it"
            )


def compute_steps(experiment: Experiment) -> int:
    """The length of a trial in steps: its samples, rounded up to whole steps."""
    return math.ceil((experiment.train.samples or 0) / experiment.train.global_batch)


def expand_arms(sweep: Sweep) -> Iterator[tuple[Arm, Settings]]:
    """Every combination of the axes with every draw of the search: the arm, and the settings of the arm."""
    axes = [
        [(axis, label, _settings(axis, values, number)) for number, label in enumerate(make_labels(values))]
        for axis, values in sweep.axes.items()
    ]
    for drawn in draw_settings(sweep):
        for point in itertools.product(*axes):
            arm = [(axis, label) for axis, label, _ in point] + [(key, str(value)) for key, value in drawn.items()]
            settings: Settings = {}
            for _, _, of_axis in point:
                settings |= of_axis
            yield tuple(arm), {**settings, **drawn}


def draw_settings(sweep: Sweep) -> list[Settings]:
    """The draws of the search. They are the same at every start of a sweep, so that trials can be resumed.

    Raises ConfigError where the search does not have as many different settings.
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
    draws: list[Settings] = []
    for _ in range(TRIES * (sweep.draws or 0)):
        drawn = {key: _plain(domain.sample(random_state=random)) for key, domain in domains.items()}
        if drawn not in draws:
            draws.append(drawn)
        if len(draws) == sweep.draws:
            return draws
    raise ConfigError(f"draws = {sweep.draws}: the search has {len(draws)} different settings; lower draws")


def scale_lr(base: Experiment, experiment: Experiment, rule: str) -> Settings:
    """Settings of `experiment` for its batch size, if that differs from the base's.

    Learning rates are scaled by `rule`. Warm-up, decay and validations take the same number of samples as in the base, to the
    nearest step, and one step at least.
    """
    optim, train = experiment.optim, experiment.train
    ratio = train.global_batch / base.train.global_batch
    factor = {"constant": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[rule]
    scaled: Settings = {"optim.lr": optim.lr * factor, "optim.final_lr": optim.final_lr * factor}
    if optim.warmup_steps:
        scaled["optim.warmup_steps"] = max(1, round(optim.warmup_steps / ratio))
    if optim.decay_steps:
        scaled["optim.decay_steps"] = max(1, round(optim.decay_steps / ratio))
    if train.eval_every:
        scaled["train.eval_every"] = max(1, round(train.eval_every / ratio))
    return scaled


def name_trials(sweep: Sweep, trials: Sequence[Trial], data: Sequence[str]) -> list[Trial]:
    """Give the trials the names of their runs: sweep, arm (shortened), seed, and a digest of settings and data.

    data: a hash of each trial's sets and classes.
    """
    names: dict[str, str] = {}
    named = []
    for trial, data_hash in zip(trials, data, strict=True):
        digest = hash_trial(trial.experiment, data_hash)
        label = "-".join(f"{axis.rpartition('.')[2]}_{value}" for axis, value in trial.arm)
        label = re.sub(r"[^A-Za-z0-9._-]+", "_", label)[:LABEL_CHARACTERS]
        name = names.setdefault(digest, f"{sweep.name}-{label}-seed_{trial.seed}-{digest[:DIGEST_DIGITS]}")
        named.append(replace(trial, experiment=trial.experiment.model_copy(update={"name": name})))
    return named


def hash_trial(experiment: Experiment, data: str) -> str:
    """sha256 of everything that a trial's result depends on: its settings, its data, and its initial weights."""
    content = experiment.model_dump(mode="json", exclude=IRRELEVANT_SETTINGS)
    if experiment.optim.decay_steps is None:  # the setting is younger than sweeps that are under way
        del content["optim"]["decay_steps"]
    if weights := experiment.vision.weights:
        place = Path(weights).expanduser()
        files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
        content["weights"] = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files) or weights
    if start := experiment.train.from_:
        content["start"] = read_manifest(choose_checkpoint(start))["sha256"]["model.safetensors"]
    return hashlib.sha256(json.dumps([content, data], sort_keys=True).encode()).hexdigest()


def hash_definition(sweep: Sweep, trials: Sequence[Trial]) -> str:
    """sha256 of the definition of a sweep and of its trials. Another budget, base or metric is another sweep."""
    content = [
        sweep.model_dump(mode="json", exclude={"concurrent", "base", "overrides", "margin"}),
        [trial.name for trial in trials],
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def find_reference(sweep: Sweep) -> Arm:
    """The arm that all other arms are compared with. Of the draws of a search, the first draw."""
    chosen = {axis: str(sweep.reference.get(axis, make_labels(values)[0])) for axis, values in sweep.axes.items()}
    return next(arm for arm, _ in expand_arms(sweep) if all(chosen.get(axis, value) == value for axis, value in arm))


def _settings(axis: str, values: tuple[Any, ...] | dict[str, Settings], number: int) -> Settings:
    return {axis: values[number]} if isinstance(values, tuple) else dict(list(values.values())[number])


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _assignments(settings: Settings) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]  # JSON is YAML, and keeps null and lists
