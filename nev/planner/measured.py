"""A run's own numbers: the rate of a rank, the wait for data, and where the run logged it, the rate of a decoding core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nev.config.base import ConfigError
from nev.runs.manifest import latest_checkpoint, read_manifest
from nev.runs.metrics_log import read_points

RATE, WAIT, DECODE = "images_per_s", "data_wait_share", "decode_images_per_s_core"  # names of metrics
WARM_UP = 0.2  # share of the logged windows, the first ones, that no rate counts


@dataclass(frozen=True)
class Measured:
    """What a run measured.

    run: the run, for messages.
    world: number of ranks.
    batch: images of a step.
    step_s: of a step, without the wait for data.
    wait_share: of the time that waited for data.
    decode_images_s: images a second that a core decodes; None where the run did not log it.
    """

    run: str
    world: int
    batch: int
    step_s: float
    wait_share: float
    decode_images_s: float | None

    @property
    def rank_images_s(self) -> float:
        """Images a second of a rank that waits for nothing."""
        return self.batch / self.step_s / self.world


def read_run(run: str) -> Measured:
    """The numbers of a run's folder. Raises ConfigError where it has none, and CheckpointError or StorageError for damage."""
    newest = latest_checkpoint(run)
    if newest is None:
        raise ConfigError(
            f"{run}: no checkpoint of a run lies there, so the run has no numbers. Give RUN of OUTPUT/RUN"
        )
    manifest = read_manifest(newest)
    points = read_points(run, int(manifest["step"]))
    metrics = {
        name: [(point.step, point.metrics[name]) for point in points if name in point.metrics]
        for name in (RATE, WAIT, DECODE)
    }
    return summarise(run, metrics, int(manifest["config"]["train"]["global_batch"]), int(manifest["world_size"]))


def read_mlflow_run(uri: str, run_id: str) -> Measured:
    """The numbers of an MLflow run of nev. Raises ConfigError where MLflow has no such run, or the run has no numbers."""
    from mlflow.exceptions import MlflowException

    from nev.runs.tracking import make_client

    try:
        client = make_client(uri)
        parameters = client.get_run(run_id).data.params
        histories: dict[str, Any] = {name: client.get_metric_history(run_id, name) for name in (RATE, WAIT, DECODE)}
    except MlflowException as error:
        raise ConfigError(f"{run_id}: MLflow at {uri} gives no such run: {error.message}") from None
    world, batch = parameters.get("workers.count", "None"), parameters.get("train.global_batch")
    if batch is None or not world.isdigit():
        raise ConfigError(
            f"{run_id}: needs the parameters train.global_batch and workers.count of a training by nev; a run whose workers "
            "come and go is read from its folder"
        )
    metrics = {name: [(point.step, point.value) for point in points] for name, points in histories.items()}
    return summarise(run_id, metrics, int(batch), int(world))


def summarise(run: str, metrics: Mapping[str, Sequence[tuple[int, float]]], batch: int, world: int) -> Measured:
    """One set of numbers from the logged ones.

    metrics: (step, value) by the metric's name; a window of time ends at its step and began at the one before.
    Raises ConfigError where no window is left after the warm-up.
    """
    rates, waits = dict(metrics[RATE]), dict(metrics[WAIT])
    ends = sorted(step for step in rates if rates[step] > 0)
    windows = list(zip([0, *ends], ends, strict=False))[int(WARM_UP * len(ends)) :]
    windows = windows[1:] if len(windows) == len(ends) and len(ends) > 1 else windows  # the first has the start in it
    if not windows:
        raise ConfigError(f"{run}: has logged no {RATE}, so there are no numbers to plan with")
    seconds = [batch * (end - begin) / rates[end] for begin, end in windows]
    waited = sum(waits.get(end, 0.0) * time for (_, end), time in zip(windows, seconds, strict=True))
    steps = windows[-1][1] - windows[0][0]
    decoded = [value for _, value in metrics[DECODE] if value > 0]
    return Measured(
        run=run,
        world=world,
        batch=batch,
        step_s=max(1e-9, sum(seconds) - waited) / steps,
        wait_share=waited / sum(seconds),
        decode_images_s=decoded[-1] if decoded else None,
    )
