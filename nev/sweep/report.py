"""A sweep's files: the figure, the table, the findings and the definition, beside each other and in MLflow."""

from __future__ import annotations

import json

import yaml
from rich.markup import escape
from rich.table import Table

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.file import parse, to_yaml
from nev.runs.tracking import Tracker
from nev.storage.files import join, output_folder
from nev.sweep.config import Sweep
from nev.sweep.figures import draw_figure, make_label
from nev.sweep.findings import findings, seen
from nev.sweep.results import Outcome, TrialResult


def write_report(outcome: Outcome, base: Experiment, folder: str) -> list[str]:
    """Write NAME.png, .svg, .json, .md and .yaml below `folder` (a folder or S3 prefix), and base.yaml, the experiment with what
    was overridden. Returns their locations, the figure first; there is none where no trial has a result.
    """
    sweep = outcome.sweep
    measured = {metric: outcome.values(metric) for metric in sweep.metrics}
    with output_folder(folder) as local:
        made = []
        if any(measured.values()):
            made += draw_figure(
                local / sweep.name, sweep.question or sweep.name, make_subtitle(outcome), measured, outcome.complete
            )
        for name, text in (
            (f"{sweep.name}.md", findings(outcome)),
            (f"{sweep.name}.json", json.dumps(rows(outcome), indent=1)),
            (f"{sweep.name}.yaml", to_yaml(sweep)),
            ("base.yaml", to_yaml(base)),
        ):
            made.append(local / name)
            made[-1].write_text(text, encoding="utf-8")
    return [join(folder, path.name) for path in made]


def make_subtitle(outcome: Outcome) -> str:
    """What a figure shows, in a line."""
    seeds = len(outcome.sweep.seeds)
    bars = "; bars: 95 % intervals of the means" if seeds > 1 else ""
    return f"{seen(outcome)}, {seeds} seed{'s' * (seeds > 1)}{bars}"


def rows(outcome: Outcome) -> list[dict[str, object]]:
    """A trial a row: all that was measured; and those that have failed, with what ended them."""
    found: list[dict[str, object]] = [{**result.model_dump(), "arm": dict(result.arm)} for result in outcome.results]
    return found + [{"name": name, "error": error} for name, error in outcome.errors.items()]


def outcome_table(outcome: Outcome) -> Table:
    """One line a trial, for the console."""
    sweep = outcome.sweep
    table = Table(title=escape(f"{sweep.name} ({sweep.samples:,} samples seen)"), title_justify="left")
    for column in ("arm", "seed", *sweep.metrics):
        table.add_column(column, justify="left" if column == "arm" else "right", overflow="fold")
    for result in outcome.results:
        cells = [f"{result.metrics[name]:.3g}" if name in result.metrics else "" for name in sweep.metrics]
        if result.ended_early:
            cells[0] += f" at {result.samples:,}"
        table.add_row(escape(make_label(result.arm)), str(result.seed), *cells)
    for name, error in outcome.errors.items():
        table.add_row(f"[yellow]{escape(name)} failed: {escape(error)}[/]")
    return table


def read_sweep(uri: str, name: str) -> Outcome:
    """A sweep from MLflow alone, as its newest run of that name has it: the definition, and what came of the trials.

    Raises ConfigError where MLflow has none of that name.
    """
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    everywhere = [experiment.experiment_id for experiment in client.search_experiments()]
    parents = client.search_runs(everywhere, f"tags.`nev.kind` = 'sweep' and tags.`nev.sweep` = '{name}'")
    if not parents:
        raise ConfigError(f"{uri}: no sweep is called {name!r}")
    own = Tracker(uri, parents[0].info.run_id)
    sweep = parse(Sweep, yaml.safe_load(own.read_artifact(f"{name}.yaml")), where=f"{name}.yaml in {uri}")
    found = json.loads(own.read_artifact(f"{name}.json"))
    finished = [{**row, "arm": tuple(row["arm"].items())} for row in found if "error" not in row]
    errors = {row["name"]: row["error"] for row in found if "error" in row}
    return Outcome(sweep, [TrialResult.model_validate(row) for row in finished], errors)
