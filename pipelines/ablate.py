"""Sweep an axis of an experiment with Ray Tune, at a fixed number of samples seen, and draw the figure.

python pipelines/ablate.py --config configs/ablations/batch_size.yaml
python pipelines/ablate.py --config configs/ablations/batch_size.yaml --sweep samples=10000
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from nev.cli import ConfigFile, Overrides, command, explained
from nev.config_file import parse, read_yaml
from nev.sweep_config import Sweep


def main(
    config: ConfigFile,
    overrides: Overrides = None,
    sweep_overrides: Annotated[
        list[str] | None, typer.Option("--sweep", help="Override the sweep itself: key=value. May be repeated.")
    ] = None,
) -> None:
    """Run an ablation: every point of the grid with every seed; --set overrides the base experiment."""
    console = Console()
    with explained(console, "The same command goes on; finished trials are kept."):
        sweep = parse(Sweep, read_yaml(config), sweep_overrides or [], where=config)
        from nev.experiment import how_to_look
        from nev.sweep import outcome_table, plan_trials, run_sweep

        count = len(plan_trials(sweep, overrides or []))
        with console.status(f"{count} trials, {sweep.concurrent} at a time; MLflow shows each as it runs"):
            outcome = run_sweep(sweep, overrides or [])
    console.print(outcome_table(sweep, outcome))
    console.print(f"figure      {outcome.figure}", highlight=False, soft_wrap=True)
    console.print(f"MLflow      {how_to_look(outcome.tracking_uri)}", highlight=False, soft_wrap=True)
    if not all(value is not None for value in outcome.values):
        raise typer.Exit(1)


app = command(main, "python pipelines/ablate.py --config configs/ablations/batch_size.yaml --sweep samples=10000")

if __name__ == "__main__":
    app()
