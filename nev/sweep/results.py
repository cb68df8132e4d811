"""What a trial came to, kept beside its run: a sweep that is started again reads it instead of training anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from nev.config_base import Section
from nev.data.index import content_of
from nev.data.storage import join, naming, write_whole
from nev.sweep.config import Sweep
from nev.sweep.trials import Arm, Trial, arms_of
from nev.train.output import run_folder

FILE = "result.json"
SAMPLES = "samples"  # what a trial reports to Tune of its length


class TrialResult(Section):
    """A finished trial: its run's name, arm and seed. `metrics` are its chosen checkpoint's; `samples`: those it has seen, fewer
    than the sweep's where it was ended early; `data`: the fingerprint of its training set; `run_id`: its MLflow run.
    """

    name: str
    arm: Arm
    seed: int
    metrics: dict[str, float]
    samples: int
    ended_early: bool = False
    data: str
    run_id: str
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What a sweep came to: the trials that have a result, in order, and what ended those that have failed, by name."""

    sweep: Sweep
    results: Sequence[TrialResult]
    errors: Mapping[str, str]

    @property
    def arms(self) -> list[Arm]:
        """The arms, in order."""
        return [arm for arm, _ in arms_of(self.sweep)]

    @property
    def whole(self) -> bool:
        """Whether every trial has a result."""
        return len(self.results) == len(self.arms) * len(self.sweep.seeds)

    def values(self, metric: str) -> dict[Arm, dict[int, float]]:
        """Arm to seed to the value of a metric, of trials that have it and saw all samples."""
        found: dict[Arm, dict[int, float]] = {}
        for result in self.results:
            if not result.ended_early and metric in result.metrics:
                found.setdefault(result.arm, {})[result.seed] = result.metrics[metric]
        return found


def keep(trial: Trial, result: TrialResult) -> None:
    """Write a trial's result into its run's folder."""
    file = join(run_folder(trial.experiment), FILE)
    with naming(file, "written"):
        write_whole(file, result.model_dump_json(indent=1).encode())


def kept(trial: Trial, data: str, metrics: Sequence[str]) -> TrialResult | None:
    """A trial's result; None where there is none, where it is of other data, or lacks a metric that is asked for now."""
    content = content_of(join(run_folder(trial.experiment), FILE))
    if content is None:
        return None
    try:
        result = TrialResult.model_validate_json(content)
    except ValidationError:  # torn, or another version's: its checkpoints still are there
        return None
    known = result.ended_early or set(metrics) <= result.metrics.keys()
    return result if result.data == data and known else None
