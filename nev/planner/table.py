"""A plan as rows of a table: name, value, origin, note. The console, the docs and JSON show the same rows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from nev.common.words import counted
from nev.planner.forecast import PAYS, Forecast
from nev.planner.number import Origin, least_trusted

GIB = 2**30


class Row(NamedTuple):
    """A line of a plan.

    name: what it is.
    value: with its unit.
    origin: of the number.
    note: what it is made of.
    """

    name: str
    value: str
    origin: Origin
    note: str


def forecast_rows(plan: Forecast) -> list[Row]:
    """The lines of a plan, the most asked for first."""
    return [*_rate_rows(plan), *_run_rows(plan), *_data_rows(plan), *_machine_rows(plan)]


def _rate_rows(plan: Forecast) -> list[Row]:
    step, work, images_s, world = plan.speed.step, plan.workload, plan.speed.images_s, plan.cluster.world
    share = f"{100 * images_s / plan.rate.value / world:.0f} % of what free GPUs would make"
    gpu = f"{plan.rate.source}; {work.local(world):,} images, {work.parts(world):,} at a time"
    whole = f"{work.batch:,} images; compute {step.compute:.3g} s"
    slowest = f"{100 * step.straggler / step.compute:.1f} % of compute"
    return [
        Row("images a second", f"{images_s:,.0f}", plan.origin, share),
        Row("bound by", plan.speed.bound, "computed", _headroom(plan)),
        Row("a GPU", f"{plan.rate.value:,.0f} images/s", plan.rate.origin, gpu),
        Row("step", f"{work.batch / images_s:.3g} s", plan.origin, whole),
        Row("slowest rank", f"{step.straggler:.2g} s", "assumed", slowest),
        Row("communication", f"{step.communication:.2g} s", "assumed", "that computation does not hide"),
    ]


def _headroom(plan: Forecast) -> str:
    """How far the next limit of the pictures' way is."""
    name = min(plan.speed.limits, key=lambda each: plan.speed.limits[each])
    if name == plan.speed.bound:
        return f"GPUs could take {plan.workload.batch / plan.speed.step.total:,.0f} images/s"
    return f"next: {name}, at {plan.speed.limits[name]:,.0f} images/s"


def _run_rows(plan: Forecast) -> list[Row]:
    known = [usd for usd in plan.cost.values() if usd is not None]
    unknown = [name for name, usd in plan.cost.items() if usd is None]
    parts = ", ".join(f"{name} {usd:,.0f}" for name, usd in plan.cost.items() if usd)
    note = f"no price of {', '.join(unknown)}: --prices" if unknown else parts
    cost = "not known" if unknown else f"{sum(known):,.0f} USD"
    work, every = plan.workload, f"the config has every {plan.workload.checkpoint_steps:,}"
    best = "any" if math.isinf(plan.period_steps) else f"every {max(1, round(plan.period_steps)):,} steps"
    lost = f"{plan.losses:.1f} losses in the run, {plan.repeated:,.0f} steps again"
    mtbl = "never" if math.isinf(plan.mtbl_s) else f"every {show_seconds(plan.mtbl_s)}"
    steps = f"{work.steps:,} steps, {show_seconds(plan.steps_s)} without losses"
    return [
        Row("time", show_seconds(plan.seconds), plan.origin, steps),
        Row("cost", cost, least_trusted([plan.origin, "published"]), note),
        Row("first step after", show_seconds(plan.first_step_s), "assumed", "boot and start"),
        Row("a node is lost", mtbl, "assumed" if plan.cluster.spot else "published", lost),
        Row("goodput", f"{100 * plan.goodput:.1f} %", "computed", "share of the time that is work which counts"),
        Row("best checkpoint", best, "computed", f"Young/Daly; {every}"),
    ]


def _data_rows(plan: Forecast) -> list[Row]:
    limits, decode, count = plan.speed.limits, plan.decode, plan.speed.decoders
    grown = f"all there after {show_seconds(plan.grown_s)}" if count else "the GPU nodes' vCPUs suffice"
    origin = least_trusted([plan.origin, decode.origin])
    coordinator: Origin = "measured" if plan.workload.streams == 1 else "assumed"  # streams that do not share cores
    blocks = f"{counted(plan.workload.streams, 'stream')}, blocks of {plan.workload.block_rows} rows"
    if plan.speed.bound == "coordinator":
        blocks += f"; {advise_streams(plan)}"
    return [
        Row("decoders", f"{count} {plan.cluster.decoder_name}", origin, grown),
        Row("decode", show_rate(limits["decode"]), decode.origin, f"{decode.value:,.0f} images/s a vCPU"),
        Row("ingress", show_rate(limits["ingress"]), "published", "pictures from the store, blocks from decoders"),
        Row("object store", show_rate(limits["object store"]), "published", "blocks that decoders send"),
        Row("S3 requests", show_rate(limits["S3 requests"]), "published", "5,500 requests/s of one prefix"),
        Row("coordinator", show_rate(limits["coordinator"]), coordinator, blocks),
        Row(
            "from the store", f"{plan.stored_bytes / 1e12:,.3g} TB", "assumed", f"{plan.requests / 1e6:,.3g} M requests"
        ),
    ]


def advise_streams(plan: Forecast) -> str:
    """What lifts the limit of the coordinator: the fewest streams that divide workers and blocks, or larger blocks."""
    wanted = plan.workload.batch / plan.speed.step.total
    least = math.ceil(wanted * plan.workload.streams / plan.speed.limits["coordinator"])
    common = math.gcd(plan.cluster.world, plan.workload.batch // plan.workload.block_rows)
    streams = next((count for count in range(least, common + 1) if common % count == 0), None)
    return f"data.streams={streams} lifts this limit" if streams else "a larger data.block_rows lifts this limit"


def _machine_rows(plan: Forecast) -> list[Row]:
    cluster, limit = plan.cluster, plan.cluster.gpu.memory_gib
    if plan.memory is None:
        memory = Row("memory of a GPU", "not computed", "computed", plan.workload.uncounted)
    else:
        fits = "fits" if plan.memory / GIB <= limit else "does NOT fit: lower train.micro_batch"
        memory = Row(
            "memory of a GPU", f"{plan.memory / GIB:.3g} of {limit:g} GiB", "computed", f"{fits}; as nev capacity"
        )
    each = f"{cluster.node.gpus} {cluster.gpu_name} each, {'spot' if cluster.spot else 'on demand'}"
    shares = ", ".join(f"{world:,}: {100 * share:.0f} %" for world, share in efficiencies(plan).items())
    return [
        memory,
        Row("machines", f"{cluster.nodes:,} {cluster.node_name}", "published", each),
        Row("largest W that pays", f"{plan.pays:,}", plan.origin, f"{100 * PAYS:.0f} % of a GPU on one node; {shares}"),
    ]


def efficiencies(plan: Forecast) -> dict[int, float]:
    """What a rank makes, as a share of what it makes at the smallest number of ranks, by that number."""
    first = min(plan.speeds)
    alone = plan.speeds[first].images_s / first
    return {world: speed.images_s / world / alone for world, speed in plan.speeds.items()}


def show_seconds(seconds: float) -> str:
    """A time in the unit that reads best."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def show_rate(images_s: float) -> str:
    """A limit in images a second, or words where there is none."""
    return "no limit" if math.isinf(images_s) else f"{images_s:,.0f} images/s"


def to_json(plan: Forecast) -> dict[str, Any]:
    """The plan for other programs: its rows, and the bare numbers. JSON has no infinity: null stands for it."""
    speeds = {
        str(world): {"images_s": speed.images_s, "bound": speed.bound, "decoders": speed.decoders}
        for world, speed in plan.speeds.items()
    }
    numbers = {
        "images_s": plan.speed.images_s,
        "step_s": plan.workload.batch / plan.speed.images_s,
        "steps": plan.workload.steps,
        "seconds": plan.seconds,
        "cost_usd": dict(plan.cost),
        "goodput": plan.goodput,
        "checkpoint_steps": plan.period_steps if math.isfinite(plan.period_steps) else None,
        "requests": plan.requests,
        "stored_bytes": plan.stored_bytes,
        "memory_bytes": plan.memory,
        "largest_w": plan.pays,
        "limits_images_s": {name: limit if math.isfinite(limit) else None for name, limit in plan.speed.limits.items()},
    }
    return {
        "experiment": plan.workload.name,
        "gpu": plan.cluster.gpu_name,
        "gpus": plan.cluster.world,
        "node": plan.cluster.node_name,
        "spot": plan.cluster.spot,
        "bound": plan.speed.bound,
        "rows": [row._asdict() for row in forecast_rows(plan)],
        "numbers": numbers,
        "speeds": speeds,
    }
