"""A sweep's files: the figure, the table, the findings and the definition, beside each other and in MLflow."""

from __future__ import annotations

import json
import tempfile

from rich.markup import escape
from rich.table import Table

from nev.config_base import ConfigError
from nev.config_file import parse, read_yaml, to_yaml
from nev.data.storage import folder_to_fill, join
from nev.sweep.config import Sweep
from nev.sweep.figures import draw, label_of
from nev.sweep.findings import findings
from nev.sweep.results import Outcome, TrialResult
from nev.sweep.statistics import estimate
from nev.sweep.trials import arms_of, shown
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
        cells = [shown(result.metrics[name]) if name in result.metrics else "" for name in sweep.metrics]
        if result.ended_early:
            cells[0] += f" at {result.samples:,}"
        table.add_row(escape(label_of(result.arm)), str(result.seed), *cells)
    for name, error in outcome.errors.items():
        table.add_row(f"[yellow]{escape(name)} failed: {escape(error)}[/]")
    return table


def read_sweep(uri: str, name: str) -> Outcome:
    """A sweep from MLflow alone, as its newest parent run has it: the definition, and the finished trials.

    Raises ConfigError where MLflow has none of that name.
    """
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    everywhere = [experiment.experiment_id for experiment in client.search_experiments()]
    parents = client.search_runs(everywhere, f"tags.`nev.kind` = 'sweep' and tags.`nev.sweep` = '{name}'")
    if not parents:
        raise ConfigError(f"{uri}: no sweep is called {name!r}")
    parent = parents[0].info.run_id
    with tempfile.TemporaryDirectory() as folder:
        file = client.download_artifacts(parent, f"{name}.yaml", folder)
        sweep = parse(Sweep, read_yaml(file), where=file)
    results = []
    for run in client.search_runs(everywhere, f"tags.`mlflow.parentRunId` = '{parent}'", max_results=10_000):
        tags = run.data.tags
        if "nev.arm" in tags:
            arm = tuple((axis, label) for axis, label in json.loads(tags["nev.arm"]).items())
            results.append(
                TrialResult(
                    name=run.info.run_name,
                    arm=arm,
                    seed=int(tags["nev.seed"]),
                    metrics=run.data.metrics,
                    samples=sweep.samples,
                    data=tags.get("nev.data_fingerprint", ""),
                    run_id=run.info.run_id,
                    seconds=(run.info.end_time - run.info.start_time) / 1000,
                )
            )
    places = {arm: place for place, (arm, _) in enumerate(arms_of(sweep))}
    own = [result for result in results if result.arm in places and result.seed in sweep.seeds]
    return Outcome(sweep, sorted(own, key=lambda result: (places[result.arm], result.seed)), {})
