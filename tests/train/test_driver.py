"""The driver without Ray: what it imports, how messages reach the callbacks, when it gives up, how its MLflow run ends."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.training import prepare_job
from rich.console import Console

from nev.cluster.ray_internals import WorkerGroup
from nev.common.signals import Stopped
from nev.config.eval import Eval
from nev.config.experiment import Experiment
from nev.models.text import TextTower
from nev.runs.tracking import Tracker
from nev.storage.files import StorageError
from nev.train.driver import launcher, metrics, monitor
from nev.train.driver.early_stopping import EarlyStopping
from nev.train.driver.launcher import TrainingFailed, run_workers
from nev.train.driver.metrics import MetricsCallback, MetricsLogger, open_tracking
from nev.train.driver.monitor import TrainMonitor
from nev.train.driver.step_progress import StepProgress
from nev.train.experiment import mlflow_hint
from nev.train.messages import CheckpointSaved, Failed, Left, Message, Metrics, Note, Started

Make = Callable[..., Experiment]
GROUP = WorkerGroup("controller", "placement group")


def test_the_driver_imports_no_torch() -> None:
    folder = Path(launcher.__file__).parent
    modules = [f"nev.train.driver.{file.stem}" for file in sorted(folder.glob("*.py"))]
    assert len(modules) > 8
    script = f"import importlib, sys\nfor name in {[*modules, 'nev.train.messages', 'nev.train.job']}:\n"
    script += "    importlib.import_module(name)\n    assert 'torch' not in sys.modules, name"
    subprocess.run([sys.executable, "-c", script], check=True)


class Recorder(Tracker):
    """Keeps what a tracker is given."""

    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, metrics: dict[str, float], time_ms: int | None = None) -> None:
        self.points.append((step, metrics))


def make_monitor(callbacks: list[MetricsCallback], validator: Any = None) -> tuple[TrainMonitor, Recorder, io.StringIO]:
    """A monitor without a mailbox, what its tracker was given, and what the console shows."""
    shown, tracker = io.StringIO(), Recorder()
    console = Console(file=shown, width=200)
    logger = MetricsLogger(tracker, console)
    progress = StepProgress(console, 9, 0)
    made = TrainMonitor(None, logger, [logger.log, *callbacks], EarlyStopping(Eval()), progress, validator)
    return made, tracker, shown


def handle(made: TrainMonitor, *messages: Message) -> None:
    for message in messages:
        made._handle(message)


def test_each_message_has_its_effect_and_no_name_of_a_metric_has_one() -> None:
    saved: list[int] = []
    seen: list[tuple[int, dict[str, float]]] = []
    validator = SimpleNamespace(add=saved.append, take_outcomes=list)
    made, tracker, shown = make_monitor([lambda step, metrics: seen.append((step, metrics))], validator)
    handle(made, Started(0, GROUP), Metrics(4, {"loss": 1.0, "checkpoint_write_s": 1.0}), Note("a [note]"))
    assert saved == []
    handle(made, CheckpointSaved(4, 0.5))
    assert saved == [4]
    assert tracker.points == seen == [(4, {"loss": 1.0, "checkpoint_write_s": 1.0}), (4, {"checkpoint_write_s": 0.5})]
    handle(made, Left(5))
    assert made.workers_left
    handle(made, Started(5, GROUP))
    assert not made.workers_left
    handle(made, Failed("a cause"))
    assert made.errors == ["a cause"]
    assert shown.getvalue().splitlines()[:2] == ["step 4/9  loss 1.0000", "a [note]"]
    assert "step 5: a machine is taken away" in shown.getvalue()
    assert "training continues from step 5" in shown.getvalue()


def test_a_callback_that_ends_the_process_ends_the_workers_first(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[WorkerGroup] = []
    monkeypatch.setattr(monitor, "kill_worker_group", killed.append)

    def end(step: int, metrics: dict[str, float]) -> None:
        raise SystemExit

    made, _, _ = make_monitor([end])
    assert not made.ended_by_callback
    with pytest.raises(SystemExit):
        handle(made, Started(0, GROUP), Metrics(1, {"loss": 1.0}))
    assert killed == [GROUP]
    assert made.ended_by_callback


def launch(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    max_failures: int,
    errors: list[Exception],
    ended_by_callback: bool = False,
) -> int:
    """Run workers whose starts end with these errors, the last start well. Returns how many starts there were."""
    import ray.train
    from ray.exceptions import RayActorError

    starts = 0

    class Trainer:
        def fit(self) -> None:
            nonlocal starts
            starts += 1
            if errors:
                error = errors.pop(0)
                raise error if isinstance(error, RayActorError) else ray.train.ControllerError(error)

    class Watch:
        """A monitor that has nothing to read."""

        def __init__(self) -> None:
            made, _, _ = make_monitor([])
            self.stop_requested, self.early_stopped = made.stop_requested, made.early_stopped
            self.errors: list[str] = []
            self.workers_left = False
            self.ended_by_callback = ended_by_callback

        @contextmanager
        def running(self) -> Iterator[None]:
            yield

        def poll(self) -> None:
            pass

    monkeypatch.setattr(launcher, "ray_trainer", lambda *_: Trainer())
    monkeypatch.setattr(launcher, "remove_leaked_placement_groups", lambda: None)
    config = SimpleNamespace(data=SimpleNamespace(streams=1), workers=SimpleNamespace(max_failures=max_failures))
    job: Any = SimpleNamespace(run=str(tmp_path), config=config)
    watch: Any = Watch()
    run_workers(job, None, None, watch, 0)  # type: ignore[arg-type]
    return starts


def no_room() -> Exception:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return WorkerGroupStartupTimeoutError(1)


def test_failures_without_an_end_and_waits_for_room_do_not_end_a_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    errors = [no_room(), *(RuntimeError("a worker died") for _ in range(5)), no_room()]
    assert launch(monkeypatch, tmp_path, -1, errors) == 8
    assert launch(monkeypatch, tmp_path, 0, [no_room()] * 4) == 5
    assert launch(monkeypatch, tmp_path, 2, [RuntimeError("a worker died")] * 2) == 3
    with pytest.raises(TrainingFailed, match="a worker died"):
        launch(monkeypatch, tmp_path, 2, [RuntimeError("a worker died")] * 3)
    with pytest.raises(TrainingFailed, match="cannot be read"):  # nev's own error: another start would meet it again
        launch(monkeypatch, tmp_path, -1, [StorageError("it cannot be read")])


def test_a_run_that_a_callback_has_ended_starts_no_workers_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ray.exceptions import RayActorError

    errors: list[Exception] = [RuntimeError("a worker died"), RuntimeError("another worker died")]
    with pytest.raises(Stopped):  # an MLflow run that ends so is KILLED
        launch(monkeypatch, tmp_path, -1, errors, ended_by_callback=True)
    assert len(errors) == 1, "one start"
    for ends in ([], [RayActorError()]):  # the monitor has killed Ray Train's controller
        with pytest.raises(Stopped):
            launch(monkeypatch, tmp_path, -1, ends, ended_by_callback=True)
    with pytest.raises(RayActorError):
        launch(monkeypatch, tmp_path, -1, [RayActorError()])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "status"), [(StorageError("away"), "FAILED"), (Stopped(), "KILLED"), (None, "FINISHED")]
)
def test_an_mlflow_run_ends_as_its_run_does(
    tiny: Make, text: TextTower, error: BaseException | None, status: str
) -> None:
    from mlflow import MlflowClient

    job = prepare_job(tiny(), text)
    ids = []
    with suppress(StorageError, Stopped), open_tracking(job, {}, 0, Console(quiet=True)) as tracked:
        ids.append(tracked.tracker.run_id)
        if error:
            raise error
    uri = f"sqlite:///{Path(job.config.output).absolute()}/mlflow.db"
    assert MlflowClient(tracking_uri=uri).get_run(ids[0]).info.status == status


def test_storage_that_fails_at_the_start_leaves_no_mlflow_run_that_runs(
    tiny: Make, text: TextTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    def fail(run: str, run_id: str) -> None:
        raise StorageError("mlflow.json cannot be written")

    monkeypatch.setattr(metrics, "save_mlflow_run_id", fail)
    job = prepare_job(tiny(), text)
    with pytest.raises(StorageError), open_tracking(job, {}, 0, Console(quiet=True)):
        pytest.fail("the body was entered")
    client = MlflowClient(tracking_uri=f"sqlite:///{Path(job.config.output).absolute()}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("nev").experiment_id])
    assert run.info.status == "FAILED"


def test_the_last_line_of_a_log_is_whole_and_stands_there_once() -> None:
    console = Console(file=io.StringIO(), width=20)
    progress = StepProgress(console, 9, 0)
    progress.start()
    progress.update({"loss": 1.0, "images_per_s": 1234.0})
    progress.show(1)
    progress.show(9)
    progress.stop()
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == [f"step {step}/9  loss 1.0000  1,234 images/s" for step in (1, 9)]


def test_the_command_that_starts_mlflow_runs_as_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    command, _, rest = mlflow_hint("sqlite:///mlflow.db").partition(" ")
    assert Path(command).is_file()
    assert rest == "ui --backend-store-uri sqlite:///mlflow.db"
    assert mlflow_hint("http://127.0.0.1:5000") == "http://127.0.0.1:5000"
