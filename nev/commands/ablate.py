"""Compare settings of an experiment with Ray Tune, at a fixed number of samples seen.

nev ablate --config ablations/batch_size
nev ablate --config ablations/batch_size --sweep samples=10000 --sweep "seeds=[0]"
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from nev.common.cli import Overrides, report_errors

EXAMPLE = "--config ablations/batch_size --sweep samples=10000"


def main(
    config: Annotated[
        str,
        typer.Option(
            "--config", help="Sweep: a file (YAML), or the name of a shipped one (ablations/batch_size, ...)."
        ),
    ],
    overrides: Overrides = None,
    sweep_overrides: Annotated[
        list[str] | None, typer.Option("--sweep", help="Override the sweep itself: key=value. May be repeated.")
    ] = None,
) -> None:
    """Run an ablation: every arm with every seed. --set overrides the base experiment."""
    console = Console()
    with report_errors("The same command continues: finished trials are kept, others continue from their checkpoints."):
        from nev.config.file import parse, read_config
        from nev.sweep.config import Sweep

        sweep = parse(Sweep, read_config(config), sweep_overrides or [], where=config)
        from nev.sweep.report import make_outcome_table
        from nev.sweep.run import run_sweep
        from nev.train.experiment import mlflow_hint

        summary = run_sweep(sweep, overrides or [], console)
    console.print(make_outcome_table(summary.outcome))
    for file in summary.files:
        console.print(f"{file.rpartition('.')[2]:<11} {file}", highlight=False, soft_wrap=True)
    console.print(f"MLflow      {mlflow_hint(summary.tracking_uri)}", highlight=False, soft_wrap=True)
    if not summary.outcome.all_finished:
        raise typer.Exit(1)
