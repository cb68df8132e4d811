"""Results as tables on the console."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from nev.eval.suite.results import SuiteResult


def metrics_table(metrics: dict[str, float], title: str) -> Table:
    """The metrics of a validation by their names in MLflow: value, 95 % interval, score of guessing. Shares are percentages."""
    table = Table(title=title, title_justify="left")
    has_intervals = any(key.endswith("_low") for key in metrics)
    for column in ("metric", "value", *(["95 % interval"] if has_intervals else []), "chance"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for key, value in metrics.items():
        if key.endswith(("chance", "_low", "_high")):
            continue
        chance = metrics.get(
            f"{key}_chance", metrics.get(f"{key.rpartition('/')[0]}/chance") if "top1" in key else None
        )
        ends = [f"{metrics[f'{key}_{end}']:.1%}" for end in ("low", "high") if f"{key}_{end}" in metrics]
        interval = [" to ".join(ends)] if has_intervals else []
        table.add_row(key, _format(key, value), *interval, "" if chance is None else f"{chance:.1%}")
    return table


def _format(key: str, value: float) -> str:
    area, _, name = key.partition("/")
    if area == "val":
        return f"{value:,.0f}"
    return f"{value:.3f}" if area == "space" else f"{value:.1f}" if name.startswith("scale") else f"{value:.1%}"


def suite_table(result: SuiteResult) -> Table:
    """The tasks of a suite, a line each: metric, value, 95 % interval, score of guessing, published scores."""
    table = Table(title=escape(f"{result.suite}: {result.model}"), title_justify="left")
    others = any(task.published for task in result.tasks)
    for column in ("task", "metric", "value", "95 % interval", "chance", *(["published"] if others else [])):
        left = column in ("task", "metric", "published")
        table.add_column(
            column, justify="left" if left else "right", overflow="fold", no_wrap=column == "95 % interval"
        )
    for task in result.tasks:
        if task.value is None:
            table.add_row(escape(task.name), task.metric.replace("_", " "), "[yellow]not run[/]")
            continue
        published = ", ".join(f"{name} {value:.1%}" for name, value in task.published.items())
        table.add_row(
            escape(task.name),
            task.metric.replace("_", " "),
            f"{task.value:.1%}",
            "" if task.low is None or task.high is None else f"{100 * task.low:.1f} to {task.high:.1%}",
            "" if task.chance is None else f"{task.chance:.1%}",
            *([escape(published)] if others else []),
        )
    return table
