"""Where the metrics of a run go: to MLflow, to the alerts, to early stopping, and to further callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from nev.common.errors import first_line
from nev.common.signals import Stopped
from nev.config.experiment import Experiment
from nev.runs.metrics_log import load_mlflow_run_id, read_points, save_mlflow_run_id
from nev.runs.tracking import Tracker, open_run, tracking_uri
from nev.train.driver.alerts import Alert, FailureAlerts
from nev.train.driver.early_stopping import EarlyStopping
from nev.train.job import Job

MetricsCallback = Callable[[int, dict[str, float]], None]  # (step, metrics by name), in the monitor's thread


class MetricsLogger:
    """Sends metrics and alerts to MLflow, and warnings to the console."""

    def __init__(self, tracker: Tracker, console: Console) -> None:
        self._tracker, self._console = tracker, console
        self._unreachable = False

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Queue metrics of a step for the next `flush`."""
        self._tracker.log(step, metrics)

    def alert(self, step: int, alert: Alert) -> None:
        """Print an alert, and queue it as a tag of the MLflow run."""
        text = f"step {step}: {alert.text}"
        self.warn(text)
        self._tracker.tag_later({f"nev.alert.{alert.name}": text})

    def warn(self, text: str) -> None:
        """Print a line for the person who watches."""
        self._console.print(f"[yellow]{escape(text)}[/]", highlight=False, soft_wrap=True)

    def save_trace(self, step: int, location: str) -> None:
        """Send a trace of the profiler to MLflow at once, and print where the trace lies."""
        self.warn(f"step {step}: a trace of the profiler is in {location}")
        try:
            self._tracker.artifact(location, "profile")
        except Exception as error:  # noqa: BLE001 - MLflow's stores raise whatever their packages do; training goes on
            self.warn(f"MLflow at {self._tracker.uri} has not taken the trace ({first_line(error)})")

    def flush(self) -> None:
        """Send the queue to MLflow. What MLflow does not take stays queued: training must not stop for it."""
        from mlflow.exceptions import MlflowException

        try:
            self._tracker.flush()
            self._unreachable = False
        except (MlflowException, OSError):
            if not self._unreachable:
                self.warn(f"MLflow at {self._tracker.uri} does not answer; metrics are queued and sent later")
            self._unreachable = True


def make_callbacks(config: Experiment, logger: MetricsLogger, early_stopping: EarlyStopping) -> list[MetricsCallback]:
    """The callbacks of every run: MLflow, alerts, early stopping."""
    alerts = FailureAlerts(config)

    def raise_alerts(step: int, metrics: dict[str, float]) -> None:
        for alert in alerts.check(step, metrics):
            logger.alert(step, alert)

    return [logger.log, raise_alerts, early_stopping.update]


@dataclass
class TrackedRun:
    """An MLflow run that is open. unsent: why files that MLflow should have were not sent, else ""."""

    tracker: Tracker
    unsent: str = ""


@contextmanager
def open_tracking(job: Job, tags: Mapping[str, str], start_step: int, console: Console) -> Iterator[TrackedRun]:
    """The MLflow run of a job, with its config and fingerprints. Metrics up to `start_step` that MLflow lacks are queued.

    The run ends as FINISHED; as KILLED after SIGTERM or Ctrl-C; as FAILED after any other error.
    """
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
    run, status = TrackedRun(tracker), "FAILED"
    try:
        save_mlflow_run_id(job.run, tracker.run_id)
        for point in read_points(job.run, start_step):
            tracker.log(point.step, point.metrics, point.time)
        yield run
        status = "FINISHED"
    except (Stopped, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        problem = "" if tracker.finish(status) else f"MLflow at {tracker.uri} does not answer"
        if problem or run.unsent:
            problem = problem or f"MLflow at {tracker.uri} has not taken the files ({run.unsent})"
            console.print(
                f"[yellow]{escape(problem)}. All that it would show is in {job.run}; the same command sends it[/]",
                highlight=False,
                soft_wrap=True,
            )
