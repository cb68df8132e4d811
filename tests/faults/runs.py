"""A run as its user starts it, a process of its own, and what it came to."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from benchmarks.contestants.processes import wait_for
from nev.runs import checkpoint
from nev.runs.manifest import list_checkpoints, list_steps
from nev.runs.metrics_log import load_mlflow_run_id
from nev.runs.tracking import Tracker, make_client

from .machines import environment

REPO = Path(__file__).parents[2]
STEPS, BATCH = 60, 64
LIMIT_S = 240.0


@dataclass(frozen=True)
class Result:
    """What a finished run leaves. weights, moments: sha256 of all tensors; updates: as AdamW has counted them.

    curve: step to loss, as MLflow has it; runs: how many MLflow runs there are under this name.
    """

    weights: str
    moments: str
    updates: int
    bad_rows: int
    curve: dict[int, float]
    runs: int


def settings(pictures: Path, folder: Path, **more: object) -> dict[str, object]:
    """A small experiment whose 60 steps take some 20 s on two cores, with a checkpoint every 10."""
    return {
        "name": "run",
        "output": str(folder / "runs"),
        # Small windows: with large ones so small a set would be decoded to its end before a fault strikes.
        "data": {"train": str(pictures / "train"), "image_size": 32, "block_rows": 16, "window": 1},
        "vision": {
            "trunk": "vit_tiny_patch16_224",
            "trunk_args": {"patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4, "drop_path_rate": 0.1},
        },
        "optim": {"lr": 1e-3, "warmup_steps": 5},
        "train": {"global_batch": BATCH, "steps": STEPS, "log_every": 1, "checkpoint_every": 10},
        "workers": {"count": 2, "cpus": 1, "threads": 1, "max_failures": 5, "timeout_s": 20},
        **more,
    }


class Run:
    """One experiment under one name, which may be started again and again."""

    def __init__(self, config: dict[str, object], folder: Path, address: str) -> None:
        self.config, self.address = config, address
        self.folder = f"{config['output']}/{config['name']}"
        self.file = folder / f"{config['name']}.yaml"
        self.file.write_text(yaml.safe_dump(config), encoding="utf-8")
        self.log = folder / f"{config['name']}.log"
        self.driver: subprocess.Popen[bytes] | None = None
        self.stopped: list[int] = []  # exit statuses of drivers that a SIGTERM has ended

    def start(self) -> None:
        """Start the driver: with the same command each time."""
        with self.log.open("ab") as log:
            self.driver = subprocess.Popen(
                [sys.executable, str(REPO / "pipelines" / "train.py"), "--config", str(self.file)],
                cwd=REPO,
                env=environment(self.address),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def said(self) -> str:
        """What its drivers have printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def alive(self) -> bool:
        """Whether its driver still runs."""
        return self.driver is not None and self.driver.poll() is None

    def wait_for_step(self, step: int, seconds: float = LIMIT_S) -> None:
        """Until a checkpoint of that step or a later one is there."""

        def reached() -> bool:
            if not self.alive():
                raise RuntimeError(f"the driver ended:\n{self.said()}")
            return self.newest() >= step

        wait_for(reached, seconds, f"checkpoint of step {step}")

    def newest(self) -> int:
        """The step of its newest checkpoint, 0 where there is none."""
        return max(list_steps(self.folder), default=0)

    def finish(self, seconds: float = LIMIT_S) -> int:
        """Wait for the driver's end; its exit status."""
        assert self.driver
        return self.driver.wait(seconds)

    def end(self) -> None:
        """Kill the driver, if it runs."""
        if self.driver and self.alive():
            self.driver.kill()
            self.driver.wait(30)

    def result(self) -> Result:
        """What the finished run left."""
        uri = self.tracking_uri()
        tracker = Tracker(uri, load_mlflow_run_id(self.folder) or "")
        steps, losses = tracker.history("loss")
        client = make_client(uri)
        experiment = client.get_experiment_by_name("nev")
        runs = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{self.config['name']}'")
        assert len(steps) == len(set(steps)), "a step that MLflow shows twice"
        return read_result(self.folder, dict(zip(steps, losses, strict=True)), len(runs))

    def tracking_uri(self) -> str:
        """Where its MLflow is."""
        tracking = self.config.get("tracking")
        return str(tracking["uri"]) if isinstance(tracking, dict) else f"sqlite:///{self.config['output']}/mlflow.db"


def read_result(folder: str, curve: dict[int, float], runs: int) -> Result:
    """The result of a run in `folder`, of its newest checkpoint."""
    newest = list_checkpoints(folder)[-1]
    state, weights = checkpoint.load_model(newest)
    moments, _ = checkpoint.load_training_state(newest)
    (updates,) = {int(value) for name, value in moments.items() if name.endswith("/step")}
    return Result(digest(weights), digest(moments), updates, state.bad_rows, curve, runs)


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 of all tensors, with their names."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode())
        total.update(
            tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else str(float(tensor)).encode()
        )
    return total.hexdigest()
