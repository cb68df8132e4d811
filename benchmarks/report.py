"""The one convention of all benchmarks: interleaved repetitions, medians, a table, and `benchmarks/results/NAME.json`.

Contestants take turns, so that a machine that grows warm or busy slows all of them alike, and the order turns round in
every other round. A figure is the median of its repetitions. A ratio is the median of the ratios within each round, since
two neighbours in time compare better than two medians. The JSON holds `command`, `date`, `hardware`, `versions`, `figures`
and `ratios`, beside the `goals` of figures and ratios, the raw `repetitions` and the `notes`; it names no path of the machine.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    *("nev", "torch", "torchvision", "ray", "timm", "transformers", "pyarrow", "numpy", "mlflow", "simplejpeg"),
    *("open-clip-torch", "webdataset", "lancedb", "pgvector", "psycopg", "onnxruntime", "fastapi", "uvicorn"),
)
LOAD_AT_START = os.getloadavg()[0]  # read at import, before the benchmark itself is the load


@dataclass(frozen=True)
class Ratio:
    """Figure `over` divided by figure `under`; `goal` is what the project wants to reach, at least or (`at_most`) at most."""

    over: str
    under: str
    goal: float | None = None
    at_most: bool = False


@dataclass(frozen=True)
class Goal:
    """What the project wants a figure to be: at least `value`, or (`at_most`) at most."""

    value: float
    at_most: bool = False


def measure_interleaved(
    contestants: dict[str, Callable[[], float]], repetitions: int, console: Console | None = None
) -> dict[str, list[float]]:
    """Let every contestant run `repetitions` times, in turns: name -> its results, in the order of the rounds.

    A contestant returns one number (say, images a second). Raises ValueError for fewer than one repetition.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions must be at least 1, not {repetitions}")
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(repetitions):
        for name in contestants if number % 2 == 0 else reversed(contestants):
            results[name].append(contestants[name]())
            if console:
                console.print(f"round {number + 1}/{repetitions}  {name}  {results[name][-1]:,.4g}", highlight=False)
    return results


def write(
    name: str,
    command: str,
    figures: dict[str, list[float]],
    ratios: dict[str, Ratio],
    notes: Sequence[str] = (),
    folder: Path = RESULTS,
    console: Console | None = None,
    goals: Mapping[str, Goal] = MappingProxyType({}),
) -> Path:
    """Print the table of a benchmark and write `folder/NAME.json`. Returns its path.

    `figures`: name -> repetitions; the name ends in the unit (`..._images_per_s`). `goals`: of figures, by their names. Raises
    ValueError for a figure without repetitions, for a goal of a figure that was not measured, and for a ratio of figures that
    were not measured in the same rounds.
    """
    if empty := [key for key, values in figures.items() if not values]:
        raise ValueError(f"figures without a repetition: {', '.join(empty)}")
    if unknown := [key for key in goals if key not in figures]:
        raise ValueError(f"goals of no figure: {', '.join(unknown)}")
    quotients = {key: _quotients(key, ratio, figures) for key, ratio in ratios.items()}
    wanted = {**goals, **{key: Goal(each.goal, each.at_most) for key, each in ratios.items() if each.goal is not None}}
    report = {
        "command": without_paths(command),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
        "figures": {key: _rounded(statistics.median(values)) for key, values in figures.items()},
        "ratios": {key: _rounded(statistics.median(values)) for key, values in quotients.items()},
        "goals": {key: goal.value for key, goal in wanted.items()},
        "repetitions": {key: [_rounded(value) for value in values] for key, values in {**figures, **quotients}.items()},
        "notes": [without_paths(note) for note in notes],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console = console or Console()
    console.print(_table(name, figures, quotients, wanted))
    for note in report["notes"]:
        console.print(f"- {note}", highlight=False)
    console.print(f"written to {path}", highlight=False, soft_wrap=True)
    return path


def this_command() -> str:
    """The command line that runs now, as one types it in the repository."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def without_paths(text: str) -> str:
    """The text with every absolute path cut to its last two parts, so that no result tells where a machine keeps things."""

    def tail(found: re.Match[str]) -> str:
        return "…/" + "/".join(found.group().strip("/").split("/")[-2:])

    return re.sub(r"(?<![\w.…/:])~?/[^\s'\"=,:]+", tail, text)


def hardware() -> dict[str, Any]:
    """CPU model, cores, memory in GiB, GPUs, and the machine's load (1 min) before the benchmark began."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpus or None,
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": round(LOAD_AT_START, 2),
    }


def versions() -> dict[str, str]:
    """Python and the packages whose version a figure may depend on, those that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional one that this machine does not have
    return found


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _quotients(key: str, ratio: Ratio, figures: dict[str, list[float]]) -> list[float]:
    if missing := [name for name in (ratio.over, ratio.under) if name not in figures]:
        raise ValueError(f"ratio {key}: no figure {', '.join(missing)}; there are {', '.join(figures)}")
    over, under = figures[ratio.over], figures[ratio.under]
    if len(over) != len(under):
        raise ValueError(f"ratio {key}: {ratio.over} has {len(over)} repetitions and {ratio.under} {len(under)}")
    return [above / below for above, below in zip(over, under, strict=True)]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _table(
    name: str, figures: dict[str, list[float]], quotients: dict[str, list[float]], goals: Mapping[str, Goal]
) -> Table:
    table = Table(title=name, title_justify="left")
    table.add_column("figure or ratio")
    for column in ("median", "lowest", "highest", "goal"):
        table.add_column(column, justify="right")
    for key, values in [*figures.items(), *quotients.items()]:
        goal = goals.get(key)
        shown = f"{'at most' if goal.at_most else 'at least'} {goal.value:g}" if goal else ""
        table.add_row(key, *_spread(values), shown, end_section=key == list(figures)[-1])
    return table


def _spread(values: list[float]) -> tuple[str, str, str]:
    return f"{statistics.median(values):,.4g}", f"{min(values):,.4g}", f"{max(values):,.4g}"
