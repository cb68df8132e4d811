"""The benchmark of the planner: its ratios, and that training without Ray is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.models import make_experiment

from benchmarks import plan
from benchmarks.contestants import planned, processes, ray_job
from nev.config.experiment import Experiment
from nev.config.paths import with_absolute_paths
from nev.planner.local import shared_cores_step_s


def test_core_seconds_add_up() -> None:
    """Half a second of training; 100 images of 5 core-ms and 4 blocks of 100 beside 2 workers."""
    assert shared_cores_step_s(0.5, 2, 100, 0.005, 4, 0.1) == pytest.approx(0.95)


def test_plan_reports_how_far_it_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contestants that answer at once: 400 images/s are trained, 1,000 decoded a core, 50 blocks/s."""
    config = make_experiment(tmp_path, workers={"count": 2}, train={"global_batch": 16, "steps": 1})

    def answer(contestant: object, *arguments: object) -> float:
        if contestant is planned.coordinator_blocks_s:
            return 50.0
        return 1000.0 if contestant is planned.decode_core_images_s else 400.0

    def run(at: Experiment, steps: int) -> ray_job.JobRates:
        return ray_job.JobRates(300.0 if at.workers.count == 1 else 250.0, 100.0, 0.0)

    monkeypatch.setattr(processes, "in_own_process", answer)
    monkeypatch.setattr(ray_job, "ray_job", run)
    monkeypatch.setattr(plan, "draw_pictures", lambda folder, pictures: config)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    plan.main(steps=10, pictures=512, repetitions=1, results=tmp_path)
    written = json.loads((tmp_path / "plan_vs_measured.json").read_text())
    blocks = 16 // config.data.block_rows * 2 / 50
    alone, both = (16 / (16 / 400 + (16 / 1000 + blocks) / world) for world in (1, 2))
    assert written["figures"]["w1_predicted_images_per_s"] == pytest.approx(alone, rel=1e-3)
    assert written["figures"]["w2_predicted_images_per_s"] == pytest.approx(both, rel=1e-3)
    assert written["figures"]["off_share"] == pytest.approx(max(abs(alone / 300 - 1), abs(both / 250 - 1)), rel=1e-3)
    assert written["goals"]["off_share"] == plan.WITHIN
    assert written["figures"]["coordinator_blocks_per_s"] == 50


@pytest.mark.slow
def test_training_without_ray_is_measured(tiny: Callable[..., Experiment]) -> None:
    config = tiny(data__val=None, eval={}, train__steps=100, train__eval_every=None, workers__count=2)
    assert planned.train_images_s(with_absolute_paths(config), 10) > 0
