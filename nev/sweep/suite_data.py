"""The suite that a sweep's checkpoints are scored on, too: where its data lies, and what tells it from others."""

from __future__ import annotations

from typing import NamedTuple

from nev.common.errors import NevError
from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.embed.cache import hash_values
from nev.eval.suite.reading import make_reading
from nev.eval.suite.schema import load_suite
from nev.sweep.config import Sweep

TASK = {"name", "kind", "source", "classes", "templates", "metric", "group", "prompt"}  # what its score depends on


class SuiteData(NamedTuple):
    """Where a suite's data lies, said here since a cluster's processes do not have this one's environment; and a digest of its
    tasks and their data. Empty without a suite.
    """

    root: str
    digest: str


def read_suite(sweep: Sweep, experiment: Experiment) -> SuiteData:
    """The suite of a sweep. Raises ConfigError where a metric needs a task whose data is not there."""
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
