"""The result of a suite as JSON, and as one page of HTML that loads nothing."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from nev.eval.report.figures import Figure, run_curves
from nev.eval.suite.results import SuiteResult, TaskResult
from nev.runs.metrics_log import MetricPoint

METRICS_SHOWN = 40  # of a task, beside its table


def write_report(
    result: SuiteResult,
    figures: Sequence[Sequence[Figure]],
    others: Sequence[SuiteResult],
    points: list[MetricPoint],
    folder: Path,
    pictures: Path,
) -> list[Path]:
    """Write SUITE-STEP.html and SUITE-STEP.json to `folder`. Returns the two files.

    figures: pictures of each task, in the order of the result's tasks. The page holds them: it loads nothing and runs no script.
    others: results of other models, shown in further columns.
    points: the run's metrics up to the checkpoint; empty for a page without curves.
    pictures: folder for the curves.
    """
    numbers, page = folder / f"{result.suite}-{result.step:08d}.json", folder / f"{result.suite}-{result.step:08d}.html"
    numbers.write_text(result.model_dump_json(indent=1), encoding="utf-8")
    curves = _curves(result, points, pictures)
    beside = {task.name: {**task.published, **_beside(task.name, others)} for task in result.tasks}
    html = _template().render(
        result=result,
        tasks=list(zip(result.tasks, figures, strict=True)),
        curves=curves,
        beside=beside,
        models=list(dict.fromkeys(model for values in beside.values() for model in values)),
    )
    page.write_text(html, encoding="utf-8")
    return [page, numbers]


def _beside(name: str, others: Sequence[SuiteResult]) -> dict[str, float | None]:
    """The values of a task by model."""
    return {
        f"{other.model}, step {other.step}": task.value for other in others for task in other.tasks if task.name == name
    }


def _curves(result: SuiteResult, points: list[MetricPoint], pictures: Path) -> Figure | None:
    """The loss up to the checkpoint; None where there is none."""
    if not any("loss" in point.metrics for point in points):
        return None
    path = pictures / "curves.png"
    run_curves(path, points, result.model)
    return Figure("training: the loss up to this checkpoint", path)


def _template() -> Template:
    page = Environment(loader=PackageLoader("nev.eval.report", "templates"), autoescape=True, undefined=StrictUndefined)
    page.filters |= {"picture": _picture, "percent": _percent, "number": _number, "words": _words, "shown": _shown}
    return page.get_template("report.html")


def _picture(figure: Figure) -> Markup:
    """An image as part of the page."""
    data = base64.b64encode(figure.path.read_bytes()).decode()
    return Markup('<img alt="{}" src="data:image/png;base64,{}">').format(figure.title, data)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _number(value: object) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _shown(task: TaskResult) -> dict[str, float]:
    """The numbers of a task without the ends of intervals, up to METRICS_SHOWN."""
    rest = {name: value for name, value in task.metrics.items() if not name.endswith(("_low", "_high"))}
    return dict(list(rest.items())[:METRICS_SHOWN])
