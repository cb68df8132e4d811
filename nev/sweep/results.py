"""The result of a trial, saved in the folder of its run: a sweep that is started again reads the result instead of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from nev.config.base import Section
from nev.runs.folder import run_folder
from nev.storage.files import join, storage_errors_as, write_atomic
from nev.storage.reading import read_bytes
from nev.sweep.block_design import RESOLUTION
from nev.sweep.config import Sweep
from nev.sweep.trials import Arm, Trial, expand_arms

FILE = "result.json"
SAMPLES = "samples"  # key under which a trial reports to Tune how many rows it has seen


class TrialResult(Section):
    """A finished trial."""

    name: str
    """Name of the run."""
    arm: Arm
    """Arm of the trial."""
    seed: int
    """Seed of the trial."""
    metrics: dict[str, float]
    """Metrics of the chosen checkpoint."""
    samples: int
    """Rows seen: fewer than the sweep's where the trial was ended early."""
    ended_early: str = ""
    """Rule by which the trial was ended early (`early_end_rule`). Empty where the trial saw all samples."""
    suite: str = ""
    """Digest of the suite that the checkpoint was scored on. Empty without a suite."""
    run_id: str
    """Id of the MLflow run."""
    seconds: float
    """Wall-clock time of the trial."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a sweep.

    sweep: the definition.
    results: of the trials that have a result, in order.
    errors: cause of each failed trial, by the trial's name.
    """

    sweep: Sweep
    results: Sequence[TrialResult]
    errors: Mapping[str, str]

    @property
    def arms(self) -> list[Arm]:
        """The arms, in order."""
        return [arm for arm, _ in expand_arms(self.sweep)]

    @property
    def all_finished(self) -> bool:
        """Whether every trial has a result."""
        return len(self.results) == len(self.arms) * len(self.sweep.seeds)

    @property
    def complete_arms(self) -> set[Arm]:
        """The arms whose seeds have all seen all samples. Of another arm only the better seeds may be left."""
        finished = [result.arm for result in self.results if not result.ended_early]
        return {arm for arm in finished if finished.count(arm) == len(self.sweep.seeds)}

    @property
    def samples(self) -> tuple[int, int]:
        """The fewest and the most rows that a finished trial has seen. They differ by the rounding up to whole steps."""
        samples = [result.samples for result in self.results if not result.ended_early] or [self.sweep.samples]
        return min(samples), max(samples)

    def resolution(self, metric: str) -> float:
        """The least standard deviation of a difference that statistics assume: one picture, for a share of the validation set."""
        rows = [result.metrics["val/rows"] for result in self.results if result.metrics.get("val/rows")]
        return max(RESOLUTION, 1 / min(rows)) if rows and is_share(metric) else RESOLUTION

    def values(self, metric: str) -> dict[Arm, dict[int, float]]:
        """Values of a metric by arm and seed, for trials that have the metric and saw all samples."""
        values: dict[Arm, dict[int, float]] = {}
        for result in self.results:
            if not result.ended_early and metric in result.metrics:
                values.setdefault(result.arm, {})[result.seed] = result.metrics[metric]
        return values


def is_share(metric: str) -> bool:
    """Whether a metric is a share of counted things, from 0 to 1."""
    return not ({"space", "val", "loss", "scale", "scale_fitted"} & set(metric.split("/")) or "median" in metric)


def save_result(trial: Trial, result: TrialResult) -> None:
    """Write the result of a trial into the folder of its run."""
    file = join(run_folder(trial.experiment), FILE)
    with storage_errors_as(file, "written"):
        write_atomic(file, result.model_dump_json(indent=1).encode())


def early_end_rule(sweep: Sweep) -> str:
    """The rule by which ASHA ends trials of a sweep, as text. Empty without ASHA."""
    return f"{sweep.asha.model_dump_json()} {sweep.mode} {sweep.metrics[0]} {sweep.samples}" if sweep.asha else ""


def load_result(trial: Trial, sweep: Sweep, suite: str) -> TrialResult | None:
    """The saved result of a trial, or None where the trial must run.

    suite: digest of the sweep's suite.
    A result does not count if a metric of the sweep is missing, if its suite is another one, or if it was ended early by another
    rule than the sweep's.
    """
    content = read_bytes(join(run_folder(trial.experiment), FILE))
    if content is None:
        return None
    try:
        result = TrialResult.model_validate_json(content)
    except ValidationError:  # damaged, or of another version: the trial continues from its checkpoints
        return None
    result = result.model_copy(update={"arm": trial.arm})  # two arms of the same settings share a run
    if result.ended_early:
        return result if result.ended_early == early_end_rule(sweep) else None
    return result if set(sweep.metrics) <= result.metrics.keys() and suite in ("", result.suite) else None
