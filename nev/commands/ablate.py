"""Compare settings of an experiment with Ray Tune, at a fixed number of samples seen.

nev ablate --config ablations/batch_size
nev ablate --config ablations/batch_size --sweep samples=10000 --sweep "seeds=[0]"
nev ablate --config ablations/batch_size --plan
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
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what the sweep can see and what it costs, and run nothing.")
    ] = False,
) -> None:
    """Run an ablation: every arm with every seed. --set overrides the base experiment."""
    console = Console()
    if plan:
        with report_errors():
            print_plan(config, overrides or [], sweep_overrides or [], console)
        return
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


def print_plan(config: str, overrides: list[str], sweep_overrides: list[str], console: Console) -> None:
    """Print the size of a sweep, and the smallest difference that it finds."""
    from nev.config.file import parse, read_config
    from nev.runs.tracking import tracking_uri
    from nev.sweep.config import Sweep
    from nev.sweep.design import describe_design, make_design_table, read_before
    from nev.sweep.trials import plan_trials

    sweep = parse(Sweep, read_config(config), sweep_overrides, where=config)
    trials = plan_trials(sweep, overrides)
    first = trials[0].experiment
    before = read_before(tracking_uri(first.tracking, first.output), sweep)
    console.print(describe_design(sweep, trials), highlight=False, soft_wrap=True)
    console.print(make_design_table(sweep, len(trials) // len(sweep.seeds), before))
    if before is None:
        hint = "No sweep of this name is in MLflow: after one, the table has the metrics' own units, and times."
        console.print(f"[dim]{hint}[/]", highlight=False, soft_wrap=True)
