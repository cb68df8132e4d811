"""The data of hardware, prices and numbers, and what is said of wrong names and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nev.config.base import ConfigError
from nev.planner.cluster import make_cluster, node_price
from nev.planner.hardware import load_prices, shipped_hardware, shipped_prices
from nev.planner.number import least_trusted, shipped_numbers

ROOT = Path(__file__).parents[2]
HARDWARE = shipped_hardware()


def test_every_gpu_has_its_node_and_every_price_a_node() -> None:
    for name, gpu in HARDWARE.gpus.items():
        assert HARDWARE.nodes[gpu.node].gpu == name
    assert {node.gpu for node in HARDWARE.nodes.values()} - {None} == set(HARDWARE.gpus)
    assert set(shipped_prices().instances) <= set(HARDWARE.nodes)
    assert {HARDWARE.decoder, HARDWARE.head} <= set(shipped_prices().instances)
    assert all(price.spot is None or price.spot < price.on_demand for price in shipped_prices().instances.values())


def test_the_nodes_are_those_of_the_shipped_cluster() -> None:
    text = (ROOT / "cluster.yaml").read_text()
    for name in (HARDWARE.gpus["l40s"].node, HARDWARE.decoder, HARDWARE.head):
        assert f"InstanceType: {name}" in text


def test_measured_numbers_are_those_of_the_benchmarks() -> None:
    numbers = shipped_numbers()

    def figure(file: str, name: str) -> float:
        return float(json.loads((ROOT / f"benchmarks/results/{file}.json").read_text())["figures"][name])

    for kind in ("whole", "parts"):
        assert numbers[f"mfu_{kind}"].value == figure("step_gpu", f"{kind}_eager_mfu")
        assert numbers[f"mfu_{kind}_compiled"].value == figure("step_gpu", f"{kind}_compiled_mfu")
    stream = figure("data", "imagenet_sample_stream_images_per_s")
    assert numbers["decode_images_s"].value == pytest.approx(stream / 2, abs=0.1)


def test_a_misspelt_gpu_is_answered_with_close_ones() -> None:
    with pytest.raises(ConfigError, match="no GPU 'H-100' is known here; did you mean h100"):
        make_cluster(HARDWARE, "H-100", 8)
    with pytest.raises(ConfigError, match="known are h100, h200, gh200"):
        make_cluster(HARDWARE, "tpu-v5", 8)
    with pytest.raises(ConfigError, match=r"no type of node 'g6e.48xl' .* did you mean g6e.48xlarge"):
        make_cluster(HARDWARE, "l40s", 8, "g6e.48xl")


def test_a_part_of_a_node_is_refused_with_what_would_do() -> None:
    with pytest.raises(
        ConfigError, match=r"--gpus 12 is no whole number of p5.48xlarge.*give 8 or 16, or --node p5.4xlarge"
    ):
        make_cluster(HARDWARE, "h100", 12)
    with pytest.raises(ConfigError, match=r"--gpus 3 .*give 8$"):
        make_cluster(HARDWARE, "a100-80", 3, "p4de.24xlarge")
    assert make_cluster(HARDWARE, "h100", 1, "p5.4xlarge").nodes == 1
    assert make_cluster(HARDWARE, "l40s", 7).nodes == 7


def test_a_node_with_other_gpus_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"--node g5.8xlarge has a10g GPUs, not l40s; with l40s are g6e.4xlarge, g6e.48xlarge"
    ):
        make_cluster(HARDWARE, "l40s", 8, "g5.8xlarge")


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_prices_of_a_user_come_first(kind: str, tmp_path: Path) -> None:
    content = {
        "date": "2026-12-01",
        "source": "our contract",
        "instances": {"p5.48xlarge": {"on_demand": 30.0}, "rack": {"on_demand": 12.5}},
        "nodes": {
            "rack": {
                "gpu": "l40s", "gpus": 4, "vcpus": 64, "network_gbit_s": 100, "tcp_gbit_s": 100,
                "source": "our rack", "date": "2026-12-01",
            }
        },
    }  # fmt: skip
    path = tmp_path / f"prices.{kind}"
    path.write_text(json.dumps(content))
    hardware, prices = load_prices(str(path))
    assert node_price(prices, "p5.48xlarge", spot=False) == 30
    assert node_price(prices, "p5.48xlarge", spot=True) is None, "a price without spot has none"
    assert node_price(prices, "g6e.4xlarge", spot=False) == 3.00424
    assert prices.s3_usd_per_1000_requests == 0.0004
    assert make_cluster(hardware, "l40s", 8, "rack").nodes == 2
    assert node_price(prices, "rack", spot=False) == 12.5
    assert node_price(prices, "dgx-h100", spot=False) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("date: 2026-12-01\nsource: x\ninstnces: {}", "instnces: unknown key; did you mean instances"),
        (
            "date: 2026-12-01\nsource: x\ninstances: {p5.48xlrge: {on_demand: 1}}",
            "p5.48xlrge.*did you mean p5.48xlarge",
        ),
        ("date: 2026-12-01\nsource: x\ninstances: {p5.48xlarge: {ondemand: 1}}", "unknown key"),
        ("source: x", "date: Field required"),
        ("date: 2026-12-01\nsource: x\ninstances: {p5.48xlarge: {on_demand: true}}", "a number is needed"),
        ("[1]", "a mapping of sections is needed"),
    ],
)
def test_a_wrong_file_of_prices_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        load_prices(str(path))
    assert str(path) in str(raised.value)


def test_a_result_is_no_better_than_its_worst_part() -> None:
    assert least_trusted(["measured", "published"]) == "published"
    assert least_trusted(["assumed", "measured", "computed"]) == "assumed"
