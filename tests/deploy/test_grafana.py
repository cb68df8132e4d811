"""The Grafana dashboard of deploy/grafana, against what a real Ray exports, and against the table of the docs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.ray_head import Head, ray_head

from nev.cluster.metrics import EXPORTED

REPO = Path(__file__).parents[2]
DASHBOARD = json.loads((REPO / "deploy" / "grafana" / "nev.json").read_text(encoding="utf-8"))
SERIES = re.compile(r"\bray_\w+")
WAIT_S = 60

# A driver and a rank that export as a run does, with made-up numbers, until their input ends.
RUN = """
import sys
from types import SimpleNamespace
import ray, torch
ray.init(address=sys.argv[1], log_to_driver=False)
from nev.cluster.metrics import S3_BYTES, Instruments
from nev.cluster.ray_internals import WorkerGroup
from nev.planner.hardware import load_prices
from nev.train.driver.run_metrics import RunMetrics, export_cost
from nev.train.messages import CheckpointSaved, Metrics, Started

@ray.remote(num_cpus=1)
class Rank:
    def export(self):
        from nev.train.worker import rank_metrics
        from nev.train.worker.meters import Interval
        rank_metrics.find_peak = lambda ctx: 1e12
        job = SimpleNamespace(config=SimpleNamespace(name="scraped"), flops=1e9)
        ctx = SimpleNamespace(rank=3)
        interval = Interval(10, 640, {"data": 0.5, "compute": 1.5, "checkpoint": 0.25})
        rank_metrics.make_export(job, ctx)(interval)
        Instruments({"run": "scraped"}).add(S3_BYTES, 1000)

rank = Rank.remote()
ray.get(rank.export.remote())
instruments = Instruments({"run": "scraped"})
run = RunMetrics(instruments, 0, 1.0)
group = WorkerGroup(None, None)
for message in (Started(0, group), Metrics(10, {"bad_rows": 7.0}), Started(5, group), Metrics(10, {}), CheckpointSaved(10, 0.1)):
    run.observe(message)
with export_cost(instruments, load_prices(None)[1], print, period_s=0.2):
    print("exported", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head("--labels=nev.io/instance-type=g6e.4xlarge,ray.io/market-type=spot") as started:
        yield started


@pytest.fixture(scope="module")
def scraped(head: Head) -> Iterator[dict[str, list[str]]]:
    """The lines of a scrape by the name of their metric."""
    command = [sys.executable, "-c", RUN, head.address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=head.env) as driver:
        assert driver.stdin
        assert driver.stdout
        try:
            assert driver.stdout.readline() == "exported\n"
            deadline, lines = time.monotonic() + WAIT_S, dict[str, list[str]]()
            while not {each.series for each in EXPORTED} <= lines.keys() and time.monotonic() < deadline:
                time.sleep(0.5)
                lines = {}
                for line in head.scrape().splitlines():
                    if not line.startswith("#"):
                        lines.setdefault(re.split(r"[{ ]", line)[0], []).append(line)
            yield lines
        finally:
            driver.stdin.close()


def expressions() -> dict[str, list[str]]:
    """The expressions of each panel, by its title."""
    return {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in DASHBOARD["panels"]}


@pytest.mark.ray
@pytest.mark.slow
def test_a_scrape_has_every_metric_with_its_tags_and_no_other(scraped: dict[str, list[str]]) -> None:
    assert {name for name in scraped if name.startswith("ray_nev_")} == {each.series for each in EXPORTED}
    for each in EXPORTED:
        line = scraped[each.series][0]
        assert 'run="scraped"' in line
        assert ('rank="3"' in line) == ("rank" in each.tags)
        assert 'SessionName="' in line, "the dashboard selects by this label of Ray's"
    values = {name: [float(line.rpartition(" ")[2]) for line in lines] for name, lines in scraped.items()}
    assert values["ray_nev_images_total"] == [640]
    assert sorted(values["ray_nev_phase_seconds_total"]) == [0.25, 0.5, 1.5]
    assert values["ray_nev_mfu"] == [pytest.approx(640 * 1e9 / (2 * 1e12))]
    assert values["ray_nev_goodput"] == [pytest.approx(10 / 15)]
    assert values["ray_nev_restarts"] == [1]
    assert values["ray_nev_bad_rows"] == [7]
    assert values["ray_nev_s3_read_bytes_total"] == [1000]
    assert 0 < values["ray_nev_cost_usd"][0] < 0.1
    assert abs(time.time() - values["ray_nev_checkpoint_timestamp_seconds"][0]) < 300


@pytest.mark.ray
@pytest.mark.slow
def test_every_panel_shows_what_a_run_exports(scraped: dict[str, list[str]]) -> None:
    for title, each in expressions().items():
        assert each, title
        for expression in each:
            names = set(SERIES.findall(expression))
            assert names, title
            assert names <= scraped.keys(), title
    assert set(SERIES.findall(json.dumps(DASHBOARD["templating"]))) <= scraped.keys()


def test_every_metric_is_on_a_panel_and_in_the_docs() -> None:
    shown = {name for each in expressions().values() for expression in each for name in SERIES.findall(expression)}
    assert shown == {each.series for each in EXPORTED}
    page = (REPO / "docs" / "observability.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip().strip("`"): line for line in page.splitlines() if line.startswith("| `ray_nev_")}
    assert rows.keys() == {each.series for each in EXPORTED}
    for each in EXPORTED:
        cells = [cell.strip() for cell in rows[each.series].split("|")]
        assert cells[2:4] == [", ".join(f"`{tag}`" for tag in each.tags), each.unit]


def test_the_dashboard_keeps_rays_conventions() -> None:
    """Variables by Ray's names, every query through them, and no label that changes at a restart."""
    variables: list[dict[str, Any]] = DASHBOARD["templating"]["list"]
    assert [each["name"] for each in variables] == ["datasource", "window", "SessionName", "Run"]
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == "${datasource}"
        for target in panel["targets"]:
            selectors = re.findall(r"ray_nev_\w+\{([^}]*)\}", target["expr"])
            assert len(selectors) == len(SERIES.findall(target["expr"]))
            assert all('SessionName=~"$SessionName", run=~"$Run"' in selector for selector in selectors)
            assert "WorkerId" not in target["expr"]
