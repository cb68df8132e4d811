"""The suite that the checkpoints of a sweep are scored on: the location of its data, and a digest."""

from __future__ import annotations

from typing import NamedTuple

from nev.common.errors import NevError
from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.embed.cache import hash_values
from nev.eval.suite.reading import make_reading
from nev.eval.suite.schema import load_suite
from nev.sweep.config import Sweep

TASK = {
    "name",
    "kind",
    "source",
    "classes",
    "templates",
    "metric",
    "group",
    "prompt",
}  # fields that change a task's score


class SuiteData(NamedTuple):
    """A suite's data. Both fields are empty without a suite.

    root: location of the data. The driver finds it from its environment, which processes of a cluster do not have.
    digest: hash of the tasks and their data.
    """

    root: str
    digest: str


def read_suite(sweep: Sweep, experiment: Experiment) -> SuiteData:
    """Read the suite of a sweep. Raises ConfigError where a metric needs a task whose data is missing."""
    if not sweep.suite:
        return SuiteData("", "")
    suite = load_suite(sweep.suite)
    known = [suite.model_dump_json(include={"tasks": {"__all__": TASK}})]
    for task in suite.tasks:
        try:
            known.append(make_reading(task, suite.root, experiment.data.image_size, experiment.data.limits, 1).key)
        except NevError as error:
            if any(name.startswith(f"{task.name}/") for name in sweep.metrics):
                raise ConfigError(f"the suite {sweep.suite} cannot score {task.name}: {error}") from error
    return SuiteData(suite.root, hash_values(*known))
