"""Where the numbers of a run go, wherever they come from: to MLflow, to the watch for signs of failure, and to early stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from nev.cluster.ray_internals import WorkerGroup
from nev.config.experiment import Experiment
from nev.runs.metrics_log import load_mlflow_run_id, read_points, save_mlflow_run_id
from nev.runs.tracking import Tracker, open_run, tracking_uri
from nev.train.driver.alerts import FailureAlerts
from nev.train.driver.early_stopping import EarlyStopping

if TYPE_CHECKING:
    from nev.train.job import Job


MetricsCallback = Callable[[int, dict[str, float], WorkerGroup | None], None]


class MetricsLogger:
    """Of one run, in the driver. latest: the newest value of each metric; group: the workers that train now;
    heard: who else is told, in the thread that takes.
    """

    def __init__(
        self, config: Experiment, tracker: Tracker, console: Console, heard: MetricsCallback | None = None
    ) -> None:
        self.tracker, self.patience = tracker, EarlyStopping(config.eval)
        self.latest: dict[str, float] = {}
        self.group: WorkerGroup | None = None
        self._alerts, self._console, self._heard = FailureAlerts(config), console, heard

    def take(self, step: int, metrics: dict[str, float]) -> None:
        """Log numbers of a step, and look what they say of the run."""
        self.latest.update(metrics)
        self.tracker.log(step, metrics)
        for alert in self._alerts.check(step, metrics):
            said = f"step {step}: {alert.text}"
            self.note(said)
            self.tracker.tag_later({f"nev.alert.{alert.name}": said})
        self.patience.update(step, metrics)
        if self._heard:
            self._heard(step, metrics, self.group)

    def note(self, text: str) -> None:
        """A line for the person who watches."""
        self._console.print(f"[yellow]{escape(text)}[/]", highlight=False, soft_wrap=True)


def start_tracking(job: Job, tags: Mapping[str, str], begun: int) -> Tracker:
    """The MLflow run of this job, with the config and the fingerprints; it gets what it has missed up to step `begun`."""
    config = job.config
    fingerprints = {f"nev.{name}_fingerprint": value for name, value in job.fingerprints.items()}
    tracker = open_run(
        tracking_uri(config.tracking, config.output),
        config.tracking.experiment,
        config.name,
        config,
        {**tags, **fingerprints, "nev.tail_rows": str(job.plan.tail_rows)},
        config.output,
        run_id=load_mlflow_run_id(job.run),
    )
    save_mlflow_run_id(job.run, tracker.run_id)
    for point in read_points(job.run, begun):
        tracker.log(point.step, point.metrics, point.time)
    return tracker
