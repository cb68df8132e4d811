"""The files of a sweep: the figure, the table, the findings and the definition, in one folder and in MLflow."""

from __future__ import annotations

import json

from rich.markup import escape
from rich.table import Table

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.file import load_yaml, parse, to_yaml
from nev.runs.tracking import Tracker
from nev.storage.files import join, output_folder
from nev.sweep.config import Sweep
from nev.sweep.figures import draw_figure, make_label
from nev.sweep.findings import describe_findings, samples_seen
from nev.sweep.results import Outcome, TrialResult


def write_report(outcome: Outcome, base: Experiment, folder: str) -> list[str]:
    """Write NAME.png, .svg, .json, .md and .yaml, and base.yaml, the base experiment with its overrides.

    folder: a folder or S3 prefix.
    Returns the locations of the files, the figure first. Without any result there is no figure.
    """
    sweep = outcome.sweep
    measured = {metric: outcome.values(metric) for metric in sweep.metrics}
    with output_folder(folder) as local:
        files = []
        if any(measured.values()):
            files += draw_figure(
                local / sweep.name,
                sweep.question or sweep.name,
                make_subtitle(outcome),
                measured,
                outcome.complete_arms,
            )
        for name, text in (
            (f"{sweep.name}.md", describe_findings(outcome)),
            (f"{sweep.name}.json", json.dumps(make_rows(outcome), indent=1)),
            (f"{sweep.name}.yaml", to_yaml(sweep)),
            ("base.yaml", to_yaml(base)),
        ):
            files.append(local / name)
            files[-1].write_text(text, encoding="utf-8")
    return [join(folder, path.name) for path in files]


def make_subtitle(outcome: Outcome) -> str:
    """One line about what the figure shows."""
    seeds = len(outcome.sweep.seeds)
    bars = "; bars: 95 % intervals of the means" if seeds > 1 else ""
    return f"{samples_seen(outcome)}, {seeds} seed{'s' * (seeds > 1)}{bars}"


def make_rows(outcome: Outcome) -> list[dict[str, object]]:
    """One row per trial: the whole result, or the error of a trial that failed."""
    rows: list[dict[str, object]] = [{**result.model_dump(), "arm": dict(result.arm)} for result in outcome.results]
    return rows + [{"name": name, "error": error} for name, error in outcome.errors.items()]


def make_outcome_table(outcome: Outcome) -> Table:
    """One line per trial, for the console."""
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
    """Read a sweep from its newest run in MLflow. Raises ConfigError where MLflow has no sweep of that name."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    everywhere = [experiment.experiment_id for experiment in client.search_experiments()]
    parents = client.search_runs(everywhere, f"tags.`nev.kind` = 'sweep' and tags.`nev.sweep` = '{name}'")
    if not parents:
        raise ConfigError(f"{uri}: no sweep is called {name!r}")
    parent = Tracker(uri, parents[0].info.run_id)
    sweep = parse(Sweep, load_yaml(parent.read_artifact(f"{name}.yaml")), where=f"{name}.yaml in {uri}")
    rows = json.loads(parent.read_artifact(f"{name}.json"))
    finished = [{**row, "arm": tuple(row["arm"].items())} for row in rows if "error" not in row]
    errors = {row["name"]: row["error"] for row in rows if "error" in row}
    return Outcome(sweep, [TrialResult.model_validate(row) for row in finished], errors)
