"""A sweep's files: the figure, the table, the findings and the definition, beside each other and in MLflow."""

from __future__ import annotations

import json

from rich.markup import escape
from rich.table import Table

from nev.config_file import to_yaml
from nev.data.storage import folder_to_fill, join
from nev.sweep.figures import draw, label_of
from nev.sweep.findings import findings
from nev.sweep.results import Outcome
from nev.sweep.statistics import estimate
from nev.sweep.trials import shown
from nev.tracking import Tracker


def write_report(outcome: Outcome, folder: str, parent: Tracker) -> list[str]:
    """Write NAME.png, .svg, .json, .md and .yaml below `folder` (a folder or S3 prefix), and log them and the means to the parent
    run. Returns their locations, the figure first; there is none where no trial has a result.
    """
    sweep = outcome.sweep
    measured = {metric: outcome.values(metric) for metric in sweep.metrics}
    with folder_to_fill(folder) as local:
        made = []
        if any(measured.values()):
            seeds = f"{len(sweep.seeds)} seed{'s' * (len(sweep.seeds) > 1)}"
            subtitle = f"{sweep.samples:,} samples seen, {seeds}; bars: 95 % intervals of the means; dotted: the fit"
            made += draw(local / sweep.name, sweep.question or sweep.name, subtitle, measured)
        for kind, text in (
            ("md", findings(outcome)),
            ("json", json.dumps(rows(outcome), indent=1)),
            ("yaml", to_yaml(sweep)),
        ):
            made.append(local / f"{sweep.name}.{kind}")
            made[-1].write_text(text, encoding="utf-8")
    files = [join(folder, path.name) for path in made]
    for file in files:
        parent.artifact(file)
    for place, arm in enumerate(outcome.arms):
        means = {
            f"mean/{metric}": estimate(list(values[arm].values())).mean
            for metric, values in measured.items()
            if arm in values
        }
        parent.log(place, means)
    return files


def rows(outcome: Outcome) -> list[dict[str, object]]:
    """A trial a row: its arm, its seed, all that was measured, and what ended it."""
    return [
        {
            "trial": trial.name,
            "arm": dict(trial.arm),
            "seed": trial.seed,
            "samples": result.samples if result else 0,
            "ended_early": bool(result and result.ended_early),
            "seconds": result.seconds if result else None,
            "mlflow_run_id": result.run_id if result else None,
            "metrics": result.metrics if result else {},
            "error": error,
        }
        for trial, result, error in zip(outcome.trials, outcome.results, outcome.errors, strict=True)
    ]


def outcome_table(outcome: Outcome) -> Table:
    """One line a trial, for the console."""
    sweep = outcome.sweep
    table = Table(title=escape(f"{sweep.name} ({sweep.samples:,} samples seen)"), title_justify="left")
    for column in ("arm", "seed", *sweep.metrics):
        table.add_column(column, justify="left" if column == "arm" else "right", overflow="fold")
    for trial, result, error in zip(outcome.trials, outcome.results, outcome.errors, strict=True):
        if result is None:
            cells = [f"[yellow]failed: {escape(error or 'it did not run')}[/]"]
        else:
            cells = [shown(result.metrics[name]) if name in result.metrics else "" for name in sweep.metrics]
            if result.ended_early:
                cells[0] += f" at {result.samples:,}"
        table.add_row(escape(label_of(trial.arm)), str(trial.seed), *cells)
    return table
