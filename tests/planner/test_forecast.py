"""`nev plan`: a plan of a small experiment, what bounds it, a run's own numbers, and every error before any work."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from nev.commands.main import app
from nev.config.base import ConfigError
from nev.planner.cluster import Cluster, make_cluster
from nev.planner.forecast import COMMUNICATION, COMPUTE, largest_that_pays, make_forecast
from nev.planner.hardware import shipped_hardware, shipped_prices
from nev.planner.measured import Measured, read_mlflow_run, read_run, summarise
from nev.planner.network import Message
from nev.planner.number import Number, shipped_numbers
from nev.planner.table import forecast_rows, show_seconds, to_json
from nev.planner.workload import Workload, possible_worlds
from nev.runs.metrics_log import MetricPoint, write_points

BASE = ["plan", "--config", "nomic_embed_vision_v1_5", "--width", "768"]
GRADIENTS = 371_786_752


def workload(batch: int = 65_536, block_rows: int = 256, **changes: Any) -> Workload:
    """The paper's run in numbers, without its tower."""
    sent = (Message("all_reduce", "gradients (DDP)", 15, GRADIENTS, 0.5), Message("all_gather", "texts", 1, 1e8, 0.5))
    worlds = [2**power for power in range(11)]
    made = Workload(
        name="paper",
        batch=batch,
        block_rows=block_rows,
        streams=1,
        part=256,
        compiled=False,
        rows=1_547_277_668,
        steps=70_827,
        checkpoint_steps=1000,
        flops=106.58e9,
        weights=float(GRADIENTS),
        decoded=150_528.0,
        text_bytes=1536.0,
        messages={world: sent if world > 1 else () for world in worlds},
        memory=30 * 2.0**30,
    )
    return replace(made, **changes)


def cluster(gpu: str = "h100", gpus: int = 16, **options: Any) -> Cluster:
    return make_cluster(shipped_hardware(), gpu, gpus, **options)


def numbers(**values: float) -> dict[str, Number]:
    return {**shipped_numbers(), **{name: Number(value, "measured", "a test") for name, value in values.items()}}


def test_the_rate_is_the_share_of_the_peak_over_the_flops() -> None:
    plan = make_forecast(workload(), cluster(), numbers(straggler=0.0, blocks_s=1e6), shipped_prices())
    alone = 0.12489 * 989e12 / 106.58e9
    assert plan.rate.value == pytest.approx(alone, rel=0.01)
    assert plan.speed.images_s == pytest.approx(16 * alone, rel=0.01)
    assert plan.speed.bound == COMPUTE
    assert plan.steps_s == pytest.approx(70_827 * 65_536 / plan.speed.images_s)
    assert plan.seconds == pytest.approx(plan.steps_s + plan.first_step_s, rel=0.01)


@pytest.mark.parametrize(
    ("gpus", "change", "options", "bound"),
    [
        (16, {}, {}, COMPUTE),
        (16, {"blocks_s": 10.0}, {}, "coordinator"),
        (16, {"s3_requests_s": 100.0}, {}, "S3 requests"),
        (16, {"decode_images_s": 10.0}, {"decoders": 2}, "decode"),
        (16, {"picture_bytes": 5e6}, {}, "ingress"),
        (64, {"network_share": 1e-4}, {}, COMMUNICATION),
        (16, {"rank_vcpus": 24.0, "decode_images_s": 500.0}, {"decoders": 1}, "object store"),
    ],
)
def test_every_bound_can_be_the_one(gpus: int, change: dict[str, float], options: dict[str, Any], bound: str) -> None:
    plan = make_forecast(workload(), cluster(gpus=gpus, **options), numbers(**change), shipped_prices())
    assert plan.speed.bound == bound
    assert plan.speed.images_s <= min(plan.speed.limits.values()) * (1 + 1e-9)
    assert plan.speed.images_s <= plan.workload.batch / plan.speed.step.total * (1 + 1e-9)


def test_more_streams_lift_the_limit_of_the_coordinator() -> None:
    """The plan says how many are needed, and that many are enough."""
    known = numbers(blocks_s=10.0)
    bound = make_forecast(workload(), cluster(), known, shipped_prices())
    assert bound.speed.images_s == 10 * 256
    note = next(row.note for row in forecast_rows(bound) if row.name == "coordinator")
    advised = int(note.partition("data.streams=")[2].split()[0])
    assert note == f"1 stream, blocks of 256 rows; data.streams={advised} lifts this limit"
    assert 16 % advised == 0, "of 16 GPUs"
    for streams, lifted in ((advised // 2, False), (advised, True)):
        plan = make_forecast(workload(streams=streams), cluster(), known, shipped_prices())
        assert plan.speed.limits["coordinator"] == streams * 10 * 256
        assert (plan.speed.bound != "coordinator") == lifted


@given(power=st.integers(3, 7), blocks_s=st.floats(20, 1000), decode=st.floats(50, 1000))
def test_more_gpus_are_never_slower_where_decoders_are_bought(power: int, blocks_s: float, decode: float) -> None:
    known = numbers(blocks_s=blocks_s, decode_images_s=decode)
    few, many = (
        make_forecast(workload(steps=100), cluster(gpus=2**at), known, shipped_prices()) for at in (power, power + 1)
    )
    assert many.speed.images_s >= few.speed.images_s * (1 - 1e-9)
    assert many.cluster.nodes == 2 * few.cluster.nodes


@given(factor=st.floats(0.1, 10))
def test_cost_follows_the_price(factor: float) -> None:
    prices = shipped_prices()
    dearer = {
        name: price.model_copy(update={"on_demand": price.on_demand * factor})
        for name, price in prices.instances.items()
    }
    base, scaled = (
        make_forecast(workload(steps=100), cluster(), numbers(), each).cost
        for each in (prices, prices.model_copy(update={"instances": dearer}))
    )
    assert scaled["GPU nodes"] == pytest.approx((base["GPU nodes"] or 0) * factor)
    assert scaled["S3 requests"] == base["S3 requests"]


def test_spot_nodes_are_cheaper_and_lose_time() -> None:
    work = workload(checkpoint_steps=100)
    known = numbers(spot_losses_hour=0.05)
    firm, spot = (
        make_forecast(work, cluster("l40s", 64, spot=spot), known, shipped_prices()) for spot in (False, True)
    )
    assert spot.goodput < 0.95 < firm.goodput
    assert spot.seconds > 1.05 * firm.seconds
    assert (spot.cost["GPU nodes"] or 0) < (firm.cost["GPU nodes"] or 0)
    assert spot.losses == pytest.approx(spot.seconds / spot.mtbl_s, rel=0.3)
    assert 1 / spot.goodput == pytest.approx(spot.seconds / spot.steps_s, rel=0.05), "formula and simulation"
    assert spot.period_steps < firm.period_steps


def test_a_group_that_loses_nodes_faster_than_it_saves_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"a node of 64 is lost every 2 min.*Lower train.checkpoint_every \(best: \d+\)"
    ):
        make_forecast(workload(), cluster("l40s", 64, spot=True), numbers(spot_losses_hour=0.5), shipped_prices())


def test_the_largest_number_that_pays_ends_before_the_first_that_does_not() -> None:
    assert largest_that_pays({8: 800, 16: 1500, 32: 2500, 64: 4900, 128: 4900}) == 64
    assert largest_that_pays({8: 800, 16: 1000, 32: 3200}) == 8
    assert largest_that_pays({1: 5.0}) == 1


def test_whole_nodes_that_divide_the_blocks() -> None:
    assert possible_worlds(65_536, 256, 8) == [8, 16, 32, 64, 128, 256]
    assert possible_worlds(3 * 256 * 8, 256, 8) == [8]
    assert possible_worlds(256, 256, 8) == []


def test_a_price_that_is_not_known_is_said() -> None:
    plan = make_forecast(workload(), cluster(node="dgx-h100"), numbers(), shipped_prices())
    row = next(row for row in forecast_rows(plan) if row.name == "cost")
    assert (row.value, row.note) == ("not known", "no price of GPU nodes: --prices")


def test_every_row_has_an_origin_and_json_has_no_infinity() -> None:
    plan = make_forecast(workload(), cluster(), numbers(gpu_losses_hour=0.0), shipped_prices())
    assert math.isinf(plan.period_steps)
    rows = forecast_rows(plan)
    assert {row.origin for row in rows} == {"measured", "published", "assumed", "computed"}
    text = json.dumps(to_json(plan), allow_nan=False)
    assert json.loads(text)["numbers"]["checkpoint_steps"] is None


def test_times_are_shown_in_the_unit_that_reads_best() -> None:
    assert [show_seconds(seconds) for seconds in (0.5, 89, 120, 7200, 86400 * 3)] == [
        "0.5 s",
        "89 s",
        "2 min",
        "2 h",
        "3 days",
    ]


# A run's own numbers


def logged(rates: dict[int, float], waits: dict[int, float] | None = None, world: int = 1) -> Measured:
    waits = waits or dict.fromkeys(rates, 0.0)
    series = {
        "images_per_s": list(rates.items()),
        "data_wait_share": list(waits.items()),
        "decode_images_per_s_core": [],
    }
    return summarise("runs/mine", series, 100, world)


def test_windows_are_weighed_by_their_time_and_the_start_is_left_out() -> None:
    """Windows of 10 steps of 100 images, at 1, 100 and 200 images/s: 20 steps in 10 + 5 s, of which half waits."""
    found = logged({10: 1.0, 20: 100.0, 30: 200.0}, {10: 0.9, 20: 0.5, 30: 0.5}, world=2)
    assert found.step_s == pytest.approx(15 / 2 / 20)
    assert found.wait_share == pytest.approx(0.5)
    assert found.rank_images_s == pytest.approx(100 / (15 / 40) / 2)


def test_a_run_that_logged_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="runs/mine: has logged no images_per_s"):
        logged({})


def test_a_measured_rate_takes_the_place_of_the_computed_one() -> None:
    """A rank that made 500 images/s in its share of 4,096, alone, makes as many in the plan."""
    measured = Measured("runs/mine", 1, 4096, 4096 / 500, 0.0, 123.0)
    plan = make_forecast(
        workload(flops=None, uncounted="a text tower"), cluster(), numbers(), shipped_prices(), measured
    )
    assert plan.rate.origin == "measured"
    assert plan.rate.value == pytest.approx(500, rel=1e-3)
    assert plan.decode.value == 123
    with pytest.raises(ConfigError, match=r"no rate is known for paper \(a text tower\): give --measured RUN"):
        make_forecast(workload(flops=None, uncounted="a text tower"), cluster(), numbers(), shipped_prices())


def test_a_run_on_the_planned_machines_predicts_itself() -> None:
    """Whatever its stragglers and collectives took, they are in the measured step, and are not counted twice."""
    measured = Measured("runs/mine", 16, 65_536, 5.0, 0.1, None)
    plan = make_forecast(workload(), cluster(), numbers(), shipped_prices(), measured)
    assert plan.speed.step.total == pytest.approx(5.0, rel=1e-3)


def test_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    run = tmp_path / "runs/mine"
    for step, rate in ((10, 50.0), (20, 100.0), (30, 100.0)):
        write_points(str(run), step, [MetricPoint(step, 0, {"images_per_s": rate, "data_wait_share": 0.2})])
    state = {"format": 3, "step": 30, "world_size": 4, "config": {"train": {"global_batch": 64}}}
    (run / "checkpoints/step-00000030").mkdir(parents=True)
    (run / "checkpoints/step-00000030/state.json").write_text(json.dumps(state))
    found = read_run(str(run))
    assert (found.world, found.batch) == (4, 64)
    assert found.step_s == pytest.approx(0.8 * 0.64)
    with pytest.raises(ConfigError, match="no checkpoint of a run lies there"):
        read_run(str(tmp_path))


@pytest.mark.slow
def test_a_run_is_read_from_mlflow(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment("nev", artifact_location=str(tmp_path))
    ours, other = (client.create_run(experiment).info.run_id for _ in range(2))
    for key, value in (("train.global_batch", "64"), ("workers.count", "4")):
        client.log_param(ours, key, value)
    for step in (10, 20, 30):
        client.log_metric(ours, "images_per_s", 100.0, step=step)
        client.log_metric(ours, "data_wait_share", 0.2, step=step)
        client.log_metric(ours, "decode_images_per_s_core", 700.0, step=step)
    found = read_mlflow_run(uri, ours)
    assert (found.world, found.batch, found.decode_images_s) == (4, 64, 700.0)
    assert found.step_s == pytest.approx(0.8 * 0.64)
    with pytest.raises(ConfigError, match=r"needs the parameters train.global_batch and workers.count"):
        read_mlflow_run(uri, other)
    with pytest.raises(ConfigError, match=r"absent: MLflow at sqlite:.* gives no such run"):
        read_mlflow_run(uri, "absent")


# The command


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    written = tmp_path / "plan.json"
    arguments = [*BASE, "--gpu", "h100", "--gpus", "16", "--rows", "1547277668", "--json", str(written)]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    for word in ("images a second", "USD", "measured", "published", "assumed", "computed", "30", "p5.48xlarge"):
        assert word in done.stdout
    plan = json.loads(written.read_text())
    assert plan["numbers"]["steps"] == 3 * (1_547_277_668 // 65_536)
    assert plan["numbers"]["memory_bytes"] == pytest.approx(29.9 * 2**30, rel=0.02)
    assert plan["numbers"]["images_s"] == pytest.approx(17_900, rel=0.05)
    assert set(plan["speeds"]) == {"8", "16", "32", "64", "128", "256"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h10", "--gpus", "16"], "no GPU 'h10' is known here; did you mean h100"),
        (["--gpu", "h100", "--gpus", "12"], "--gpus 12 is no whole number of p5.48xlarge"),
        (
            ["--gpu", "h100", "--gpus", "24"],
            "train.global_batch (65536) must be a multiple of data.block_rows x workers.count",
        ),
        (["--gpu", "h100", "--gpus", "16"], "give them with --rows, or set train.steps"),
        (["--gpu", "h100", "--gpus", "0"], "equal to 1"),
        (["--gpu", "h100", "--gpus", "16", "--rows", "9"], "--rows 9 is less than a step"),
        (
            ["--gpu", "h100", "--gpus", "16", "--rows", "70000", "--measured", "/absent"],
            "no checkpoint of a run lies there",
        ),
        (["--gpu", "h100", "--gpus", "16", "--tracking", "http://x"], "--tracking needs --measured"),
        (["--gpu", "h100", "--gpus", "16", "--prices", "absent.yaml"], "absent.yaml: no such file"),
        (["--gpu", "h100", "--gpus", "16", "--json", "/absent/plan.json"], "there is no folder /absent"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("the tower was built")

    monkeypatch.setattr("nev.planner.workload.read_workload", work)
    if "--tracking" in arguments:
        arguments = [*arguments, "--rows", "70000"]
    done = CliRunner().invoke(app, [*BASE, *arguments])
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stdout == ""
