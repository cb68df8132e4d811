"""What a run exports to Ray's metrics, without Ray: time by phase in the loop, and the numbers that the driver keeps."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
from helpers.training import CPU, Reports, blocks, load_train_state, prepare_job, train_reader

from nev.cluster import metrics
from nev.cluster.metrics import Exported, Instruments
from nev.cluster.ray_internals import WorkerGroup
from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.models.precision import choose_precision
from nev.models.text import TextTower
from nev.planner.hardware import InstancePrice, Prices, peak_flops, shipped_hardware
from nev.runs.metrics_log import MetricPoint
from nev.train.driver import run_metrics
from nev.train.driver.preflight import prepare
from nev.train.driver.run_metrics import RunMetrics, checkpoint_time, export_cost, price_nodes
from nev.train.flops import count_flops, model_flops
from nev.train.messages import CheckpointSaved, Left, Message, Metrics, Started
from nev.train.worker.loop import train
from nev.train.worker.meters import Interval, StepClock
from nev.train.worker.rank_metrics import compute_mfu, find_peak
from nev.train.worker.state import RankContext

Make = Callable[..., Experiment]
GROUP = WorkerGroup(None, None)
PRICES = Prices(
    date=datetime.date(2026, 1, 1),
    source="made up",
    instances={"a": InstancePrice(on_demand=36.0, spot=7.2), "b": InstancePrice(on_demand=1.0)},
)


class Recorded(Instruments):
    """The newest value of each gauge, and the sum of each counter."""

    def __init__(self) -> None:
        super().__init__({})
        self.values: dict[str, float] = {}

    def add(self, metric: Exported, value: float, **tags: str) -> None:
        self.values[metric.name] = self.values.get(metric.name, 0.0) + value

    def set(self, metric: Exported, value: float) -> None:
        self.values[metric.name] = value


def observed(start_step: int, *messages: Message) -> dict[str, float]:
    recorded = Recorded()
    run = RunMetrics(recorded, start_step, 100.0)
    for message in messages:
        run.observe(message)
    return recorded.values


@pytest.mark.slow
def test_the_loop_exports_steps_images_and_every_second_of_a_rank_once(tiny: Make, text: TextTower) -> None:
    config = tiny(workers__count=2, train__steps=7, train__log_every=3, train__checkpoint_every=4, train__eval_every=7)
    job = prepare_job(config, text)
    ctx = RankContext(0, 1, CPU, choose_precision("fp32", CPU))
    train_state, start = load_train_state(job, ctx)
    stream = blocks(train_reader(config, text), job.plan, 0, 7)
    intervals: list[Interval] = []
    begin = time.perf_counter()
    train(job, ctx, train_state, start, stream, Reports(), export=intervals.append)
    elapsed = time.perf_counter() - begin
    assert [each.steps for each in intervals] == [
        3,
        1,
        2,
        1,
    ]  # after the logs of steps 3, 6 and the checkpoints of 4, 7
    assert [each.images for each in intervals] == [192, 64, 128, 64]
    assert [sorted(each.seconds) for each in intervals] == [
        ["compute", "data"],
        ["checkpoint", "compute", "data"],
        ["compute", "data"],
        ["checkpoint", "compute", "data", "validation"],
    ]
    total = sum(sum(each.seconds.values()) for each in intervals)
    assert 0 < total <= elapsed
    assert all(seconds >= 0 for each in intervals for seconds in each.seconds.values())


def test_pauses_are_in_no_rate_and_in_their_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def after(seconds: float) -> None:
        now[0] += seconds

    clock = StepClock(10)
    with clock.paused("profile"):
        after(100)
    with clock.waiting():
        after(1)
    clock.add_rows(8)
    after(3)
    assert clock.metrics(11, 16) == {"images_per_s": 4.0, "data_wait_share": 0.25}
    with clock.paused("checkpoint"):
        after(5)
    assert clock.take() == Interval(1, 8, {"data": 1.0, "compute": 3.0, "profile": 100.0, "checkpoint": 5.0})
    with clock.paused("checkpoint"):
        after(7)
    assert clock.take() == Interval(0, 0, {"data": 0.0, "compute": 0.0, "checkpoint": 7.0})


def test_goodput_counts_the_steps_that_a_restart_repeats() -> None:
    values = observed(20, Started(20, GROUP), Metrics(30, {"bad_rows": 4.0}), Metrics(30, {"checkpoint_wait_s": 1.0}))
    assert (values["nev_step"], values["nev_goodput"], values["nev_restarts"], values["nev_bad_rows"]) == (30, 1, 0, 4)
    values = observed(20, Started(20, GROUP), Metrics(40, {}), Started(30, GROUP), Metrics(50, {}))
    assert (values["nev_step"], values["nev_goodput"], values["nev_restarts"]) == (50, pytest.approx(30 / 40), 1)
    values = observed(0, Started(0, GROUP), Metrics(5, {}), Started(0, GROUP))
    assert values["nev_goodput"] == 0


def test_a_start_without_a_step_has_no_goodput() -> None:
    assert observed(20, Started(20, GROUP), Left(20)) == {
        "nev_step": 20,
        "nev_restarts": 0,
        "nev_checkpoint_timestamp_seconds": 100.0,
    }


def test_the_newest_checkpoint_has_the_time_of_its_write() -> None:
    values = observed(0, CheckpointSaved(10, 0.5))
    assert values["nev_checkpoint_timestamp_seconds"] == pytest.approx(time.time(), abs=60)
    points = [MetricPoint(9, 5000, {}), MetricPoint(10, 7000, {}), MetricPoint(10, 8000, {})]
    assert checkpoint_time(points, 10) == 8.0
    assert checkpoint_time([], 0) == pytest.approx(time.time(), abs=60)


def test_nodes_cost_by_type_and_market_and_an_unknown_node_is_named() -> None:
    on_demand, spot = {run_metrics.INSTANCE_TYPE: "a"}, {run_metrics.INSTANCE_TYPE: "a", "ray.io/market-type": "spot"}
    assert price_nodes([on_demand, spot], PRICES) == (pytest.approx(43.2), [])
    spot_b = {run_metrics.INSTANCE_TYPE: "b", "ray.io/market-type": "spot"}
    total, unknown = price_nodes([on_demand, spot_b, {run_metrics.INSTANCE_TYPE: "c"}, {}], PRICES)
    assert total == 36
    assert unknown == ["b has no spot price", "c has no price", "a node has no label nev.io/instance-type"]


def test_cost_grows_with_time_and_is_no_number_with_an_unknown_node(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, said = Recorded(), list[str]()
    nodes: list[dict[str, str]] = [{run_metrics.INSTANCE_TYPE: "a"}]
    monkeypatch.setattr(run_metrics, "alive_labels", lambda: nodes)

    def wait(until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not until():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    begin = time.monotonic()
    with export_cost(recorded, PRICES, said.append, period_s=0.01):
        wait(lambda: "nev_cost_usd" in recorded.values)
        first = recorded.values["nev_cost_usd"]
        wait(lambda: recorded.values["nev_cost_usd"] > first)
        assert 0 < recorded.values["nev_cost_usd"] <= 36 / 3600 * (time.monotonic() - begin)
        nodes.append({})
        wait(lambda: math.isnan(recorded.values["nev_cost_usd"]))
    assert said == ["the cost of this run is not known: a node has no label nev.io/instance-type"]
    with export_cost(Recorded(), None, said.append, period_s=0):
        pass
    assert len(said) == 1


@pytest.mark.slow
def test_a_file_of_prices_is_read_before_anything_starts(tiny: Make, tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"prices\.yaml: no such file"):
        prepare(tiny(tracking__prices=str(tmp_path / "prices.yaml")))


def test_the_share_of_the_peak_needs_known_flops_and_a_known_gpu(tiny: Make, text: TextTower) -> None:
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("NVIDIA H100 PCIe") is None  # another peak than the SXM module's
    assert all(gpu.devices for gpu in shipped_hardware().gpus.values())
    for dtype in ("fp32", "bf16"):
        assert find_peak(RankContext(0, 1, CPU, choose_precision(dtype, CPU))) is None
    gpu = tiny(workers__gpus=1)
    flops = count_flops(gpu, text.width)
    assert model_flops(gpu, text.width) == flops > 0
    assert model_flops(tiny(), text.width) is None
    assert model_flops(tiny(workers__gpus=1, train__precision="fp32"), text.width) is None
    assert model_flops(tiny(workers__gpus=1, text__mode="online"), text.width) is None
    assert compute_mfu(Interval(2, 64, {"data": 1.0, "compute": 3.0, "checkpoint": 9.0}), 1e9, 32e9) == 0.5


def test_the_flops_of_a_linear_tower_are_known_by_hand(tiny: Make, text: TextTower) -> None:
    """A multiply-add is 2 FLOPs; a backward is twice the forward, but for the first layer, whose input needs no gradient."""
    config = tiny()
    width, tokens, patch, depth = 64, 17, 8 * 8 * 3, 2
    embedding = 2 * (tokens - 1) * patch * width
    matrices = depth * 12 * 2 * tokens * width * width
    attention = depth * 2 * 2 * tokens * tokens * width
    head = 2 * width * text.width
    exact = 2 * embedding + 3 * (matrices + attention + head)
    assert count_flops(config, text.width) == pytest.approx(exact, rel=0.1)


def test_names_are_prometheus_names_and_each_is_exported_once() -> None:
    series = [each.series for each in metrics.EXPORTED]
    assert len(set(series)) == len(series)
    assert all(name.startswith("ray_nev_") and name == name.lower() for name in series)
    assert all(each.tags[0] == "run" for each in metrics.EXPORTED)
