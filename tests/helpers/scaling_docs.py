"""The tables of docs/scaling.md, as the planner makes them. `PYTHONPATH=.:tests python tests/helpers/scaling_docs.py`
writes them into the page."""

from __future__ import annotations

from pathlib import Path

from helpers.curves import CURVES, predict
from nev.config.file import load
from nev.planner.cluster import make_cluster
from nev.planner.forecast import Forecast, make_forecast
from nev.planner.hardware import load_prices
from nev.planner.number import shipped_numbers
from nev.planner.table import forecast_rows
from nev.planner.workload import possible_worlds, read_workload, with_workers

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/scaling.md"
CONFIG, ROWS, WIDTH = "nomic_embed_vision_v1_5", 1_547_277_668, 768
COMPILED = ["train.compile=true"]
WIDE = [*COMPILED, "train.global_batch=262144"]  # 1,024 ranks need as many blocks
RUNS = {
    "16 H100": ("h100", 16, False, []),
    "16 H100, compiled": ("h100", 16, False, COMPILED),
    "64 spot L40S": ("l40s", 64, True, []),
    "1,024 H100, compiled, B = 262,144": ("h100", 1024, False, WIDE),
}
SHOWN = (
    *("images a second", "bound by", "a GPU", "step", "communication", "time", "cost", "a node is lost", "goodput"),
    *("best checkpoint", "decoders", "from the store", "memory of a GPU", "largest W that pays"),
)


def forecast_for(gpu: str, gpus: int, spot: bool, settings: list[str]) -> Forecast:
    """The plan of the paper's run with some settings changed."""
    hardware, prices = load_prices(None)
    cluster, numbers = make_cluster(hardware, gpu, gpus, spot=spot), shipped_numbers()
    config = load(CONFIG, [*settings, *with_workers(gpus)])
    worlds = {*possible_worlds(config.train.global_batch, config.data.block_rows, cluster.node.gpus), gpus}
    work = read_workload(config, WIDTH, ROWS, sorted(worlds), gpus, numbers["overlap"].value)
    return make_forecast(work, cluster, numbers, prices)


def render() -> dict[str, str]:
    """The tables by name, in Markdown."""
    plans = {name: forecast_for(*run) for name, run in RUNS.items()}
    return {
        "runs": _runs(plans),
        "knees": _knees(plans["1,024 H100, compiled, B = 262,144"]),
        "curves": _curves(),
        "numbers": _numbers(),
    }


def _table(head: list[str], lines: list[list[str]]) -> str:
    rule = "|".join(["---"] * len(head))
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)])


def _runs(plans: dict[str, Forecast]) -> str:
    columns = [{row.name: row for row in forecast_rows(plan)} for plan in plans.values()]
    return _table(
        ["", *plans, "origin"], [[name, *(c[name].value for c in columns), columns[0][name].origin] for name in SHOWN]
    )


def _knees(plan: Forecast) -> str:
    def line(world: int) -> list[str]:
        speed = plan.speeds[world]
        wanted = plan.workload.batch / speed.step.total
        return [
            f"{world:,}",
            f"{plan.workload.local(world):,}",
            f"{wanted:,.0f}",
            f"{100 * speed.step.communication / speed.step.total:.1f} %",
            f"{wanted / plan.workload.block_rows:,.0f}",
            f"{wanted / speed.limits['S3 requests']:.2g}",
            f"{wanted / speed.limits['ingress']:.2g}",
            speed.bound,
        ]

    head = [
        "W",
        "images of a GPU",
        "images/s wanted",
        "communication",
        "blocks/s",
        "of S3's requests",
        "of the nodes' TCP",
        "bound by",
    ]
    return _table(head, [line(world) for world in plan.speeds])


def _curves() -> str:
    lines = []
    for name, curve in CURVES.items():
        points = predict(curve)
        last = max(points)
        off = max(abs(predicted - measured) for predicted, measured in points.values())
        lines.append(
            [
                name,
                f"{min(points)} to {last}",
                f"{100 * points[last][1]:.1f} %",
                f"{100 * points[last][0]:.1f} %",
                f"{100 * off:.1f}",
            ]
        )
    return _table(["curve", "GPUs", "published at the last", "predicted", "most that any point is off"], lines)


def _numbers() -> str:
    lines = [
        [f"`{name}`", f"{number.value:g}", number.origin, number.source] for name, number in shipped_numbers().items()
    ]
    return _table(["", "value", "origin", "from"], lines)


def marks(name: str) -> tuple[str, str]:
    """The lines of the page around a table."""
    return f"<!-- {name}, by tests/helpers/scaling_docs.py -->\n\n", f"\n\n<!-- end of {name} -->"


def insert(page: str, tables: dict[str, str]) -> str:
    """The page with its tables replaced."""
    for name, table in tables.items():
        begin, end = marks(name)
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}{table}{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), render()), encoding="utf-8")
