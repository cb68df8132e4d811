"""Results on the console."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from nev.eval.suite.results import SuiteResult


def metrics_table(metrics: dict[str, float], title: str) -> Table:
    """Shares as percentages, beside their 95 % intervals, where those are known, and what chance would score."""
    table = Table(title=title, title_justify="left")
    sure = any(key.endswith("_low") for key in metrics)
    for column in ("metric", "value", *(["95 % interval"] if sure else []), "chance"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for key, value in metrics.items():
        if key.endswith(("chance", "_low", "_high")):
            continue
        chance = metrics.get(
            f"{key}_chance", metrics.get(f"{key.rpartition('/')[0]}/chance") if "top1" in key else None
        )
        shown = {"val": f"{value:,.0f}", "space": f"{value:.3f}"}.get(key.partition("/")[0], f"{value:.1%}")
        ends = [f"{metrics[f'{key}_{end}']:.1%}" for end in ("low", "high") if f"{key}_{end}" in metrics]
        interval = [" to ".join(ends)] if sure else []
        table.add_row(key, shown, *interval, "" if chance is None else f"{chance:.1%}")
    return table


def suite_table(result: SuiteResult) -> Table:
    """A suite's tasks, one a line: what counts, its 95 % interval, what chance would score, what others have published."""
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
        known = task.low is not None and task.high is not None
        published = ", ".join(f"{name} {value:.1%}" for name, value in task.published.items())
        table.add_row(
            escape(task.name),
            task.metric.replace("_", " "),
            f"{task.value:.1%}",
            f"{100 * (task.low or 0):.1f} to {task.high:.1%}" if known else "",
            "" if task.chance is None else f"{task.chance:.1%}",
            *([escape(published)] if others else []),
        )
    return table
