"""What a sweep can see before it runs, and what that costs."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from nev.commands.main import make_pipeline
from nev.config.file import parse
from nev.sweep.block_design import least_difference
from nev.sweep.config import Sweep
from nev.sweep.design import Before, list_designs, make_design_table, measure, read_before
from nev.sweep.results import Outcome, TrialResult

METRICS = ("zero_shot/top1", "space/gap")
NOISE = 0.004


def make_sweep(seeds: int = 4) -> Sweep:
    axes = {"train.global_batch": [64, 128, 256, 512]}
    raw = {"name": "sizes", "base": "quickstart", "axes": axes, "seeds": list(range(seeds)), "samples": 1000}
    return parse(
        Sweep,
        {**raw, "overrides": {"data.block_rows": 32, "workers.count": 1, "optim.warmup_steps": 0}, "metrics": METRICS},
    )


def make_outcome(sweep: Sweep) -> Outcome:
    """Trials whose top-1 has a deviation of `NOISE` over seeds, beside an effect of the arm and one of the seed."""
    random, results = np.random.default_rng(0), []
    seed_effects = random.normal(0, 0.1, len(sweep.seeds))
    for size in ("64", "128", "256", "512"):
        for seed in sweep.seeds:
            top1 = 0.4 + float(np.log2(int(size))) / 100 + seed_effects[seed] + random.normal(0, NOISE)
            metrics = {"zero_shot/top1": top1, "space/gap": random.normal(1, 0.1)}
            made = {"arm": (("train.global_batch", size),), "seed": seed, "metrics": metrics, "samples": 1000}
            results.append(TrialResult(name=f"{size}-{seed}", run_id="r", seconds=90.0, **made))
    return Outcome(sweep, results, {})


def rendered(table: object) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_noise_and_time_are_those_of_the_trials_before() -> None:
    before = measure(make_outcome(make_sweep(seeds=8)))
    assert before
    assert before.noise["zero_shot/top1"] == pytest.approx(NOISE, rel=0.4)
    assert before.noise["space/gap"] == pytest.approx(0.1, rel=0.4)
    assert before.seconds == 90
    assert measure(make_outcome(make_sweep(seeds=2))) is None, "too few seeds for an estimate"


def test_more_seeds_see_less_and_cost_more() -> None:
    designs = list_designs(make_sweep(), arms=4)
    assert [(one.seeds, one.trials) for one in designs] == [(3, 12), (4, 16), (5, 20), (8, 32)]
    assert designs[0].least == pytest.approx(least_difference(4, 3))
    assert [one.least for one in designs] == sorted((one.least or 0 for one in designs), reverse=True)
    assert list_designs(make_sweep(seeds=1), arms=4)[0] == (1, 4, None)


def test_the_table_has_the_metrics_own_units() -> None:
    table = rendered(make_design_table(make_sweep(), 4, Before({"zero_shot/top1": 0.01, "space/gap": 0.2}, 1800.0)))
    least = least_difference(4, 4)
    (line,) = (line for line in table.splitlines() if "this sweep" in line)
    for part in ("16", f"{least:.1f}", f"{least:.1f} points", f"{0.2 * least:.3f}", "8.0 h"):
        assert part in line
    bare = rendered(make_design_table(make_sweep(seeds=2), 4, None))
    assert "none is tested" in bare
    assert "8,000" in bare, "samples of all trials"


def test_the_command_says_it_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    raw = {**make_sweep().model_dump(mode="json", exclude_defaults=True), "metrics": ["zero_shot/top1"]}
    (tmp_path / "sizes.yaml").write_text(yaml.safe_dump(raw))
    done = CliRunner().invoke(make_pipeline("ablate"), ["--config", "sizes.yaml", "--plan"], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    assert (
        "sizes: 4 arms, 4 seeds, 16 trials of 1,000 samples; 16,000 samples in 120 steps. Reference: 64." in done.output
    )
    assert "4 (this sweep)" in done.output
    assert "No sweep of this name is in MLflow" in done.output
    assert [file.name for file in tmp_path.iterdir()] == ["sizes.yaml"]
    refused = CliRunner().invoke(make_pipeline("ablate"), ["--config", "nowhere", "--plan"])
    assert refused.exit_code == 2
    assert read_before(f"sqlite:///{tmp_path}/mlflow.db", make_sweep()) is None
