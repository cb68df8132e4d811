"""What a trial came to, kept beside its run: a sweep that is started again reads it instead of training anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from nev.config.base import Section
from nev.runs.folder import run_folder
from nev.storage.files import join, storage_errors_as, write_atomic
from nev.storage.reading import read_bytes
from nev.sweep.config import Sweep
from nev.sweep.statistics import RESOLUTION
from nev.sweep.trials import Arm, Trial, expand_arms

FILE = "result.json"
SAMPLES = "samples"  # what a trial reports to Tune of its length


class TrialResult(Section):
    """A finished trial: its run's name, arm and seed. `metrics` are its chosen checkpoint's; `samples`: those it has seen, fewer
    than the sweep's where it was ended early, and then `ended_early` is `main_metric` of the sweep that did; `suite`: a digest of
    the suite that it was scored on, too; `run_id`: its MLflow run.
    """

    name: str
    arm: Arm
    seed: int
    metrics: dict[str, float]
    samples: int
    ended_early: str = ""
    suite: str = ""
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
        return [arm for arm, _ in expand_arms(self.sweep)]

    @property
    def whole(self) -> bool:
        """Whether every trial has a result."""
        return len(self.results) == len(self.arms) * len(self.sweep.seeds)

    @property
    def complete(self) -> set[Arm]:
        """The arms whose seeds all have seen all samples: what is left of others is a choice of the better ones."""
        whole = [result.arm for result in self.results if not result.ended_early]
        return {arm for arm in whole if whole.count(arm) == len(self.sweep.seeds)}

    @property
    def samples(self) -> tuple[int, int]:
        """The fewest and the most samples that a finished trial has seen: the sweep's, rounded up to whole steps."""
        seen = [result.samples for result in self.results if not result.ended_early] or [self.sweep.samples]
        return min(seen), max(seen)

    def resolution(self, metric: str) -> float:
        """The least spread of seeds that is believed: a picture, where the metric is a share of the validation set's."""
        rows = [result.metrics["val/rows"] for result in self.results if result.metrics.get("val/rows")]
        return max(RESOLUTION, 1 / min(rows)) if rows and is_share(metric) else RESOLUTION

    def values(self, metric: str) -> dict[Arm, dict[int, float]]:
        """Arm to seed to the value of a metric, of trials that have it and saw all samples."""
        found: dict[Arm, dict[int, float]] = {}
        for result in self.results:
            if not result.ended_early and metric in result.metrics:
                found.setdefault(result.arm, {})[result.seed] = result.metrics[metric]
        return found


def is_share(metric: str) -> bool:
    """Whether a metric counts, so that it is from 0 to 1."""
    return not {"space", "val", "loss"} & set(metric.split("/"))


def save_result(trial: Trial, result: TrialResult) -> None:
    """Write a trial's result into its run's folder."""
    file = join(run_folder(trial.experiment), FILE)
    with storage_errors_as(file, "written"):
        write_atomic(file, result.model_dump_json(indent=1).encode())


def main_metric(sweep: Sweep) -> str:
    """What ends trials of a sweep early, as text; empty without ASHA."""
    return f"{sweep.asha.model_dump_json()} {sweep.mode} {sweep.metrics[0]} {sweep.samples}" if sweep.asha else ""


def load_result(trial: Trial, sweep: Sweep, suite: str) -> TrialResult | None:
    """A trial's result; None where there is none, where it lacks a metric that is asked for now, was scored on another suite than
    the one of this digest, or was ended early by a rule that is not this sweep's.
    """
    content = read_bytes(join(run_folder(trial.experiment), FILE))
    if content is None:
        return None
    try:
        result = TrialResult.model_validate_json(content)
    except ValidationError:  # torn, or another version's: its checkpoints still are there
        return None
    result = result.model_copy(update={"arm": trial.arm})  # two arms of the same settings share a run
    if result.ended_early:
        return result if result.ended_early == main_metric(sweep) else None
    return result if set(sweep.metrics) <= result.metrics.keys() and suite in ("", result.suite) else None
