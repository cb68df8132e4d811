"""The forecast of a run: a workload on a cluster, with every number's origin."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

from nev.config.base import ConfigError
from nev.planner.cluster import Cluster, node_price
from nev.planner.hardware import Prices
from nev.planner.losses import best_period, goodput, mean_time_between_losses
from nev.planner.measured import Measured
from nev.planner.number import Number, Numbers, Origin, least_trusted
from nev.planner.simulate import Scenario, simulate
from nev.planner.step import StepTime, compute_from_step, compute_s, step_time
from nev.planner.stream import (
    Machines,
    Picture,
    Source,
    decoder_images_s,
    decoders_needed,
    requests_of,
    stream_limits,
)
from nev.planner.workload import Workload

PAYS = 0.75  # share of what a GPU makes on one node, below which further GPUs no longer pay
RUNS = 20  # simulated runs of a plan
LEAST_GOODPUT = 0.1  # share of the time that counts, below which a plan is refused
COMPUTE, COMMUNICATION = "compute", "exposed communication"


@dataclass(frozen=True)
class Speed:
    """What a number of ranks makes.

    step: seconds of a step by part, before data limits.
    limits: images a second that each part of the pictures' way gives.
    images_s: of all ranks.
    bound: what bounds the rate.
    decoders: nodes that decode beside the GPU nodes.
    """

    step: StepTime
    limits: dict[str, float]
    images_s: float
    bound: str
    decoders: int


@dataclass(frozen=True)
class Forecast:
    """All numbers of a plan.

    speed: of the planned number of ranks.
    rate: images a second of a GPU that waits for nothing, with its origin.
    decode: images a second of a vCPU, with its origin.
    steps_s: of all steps, without losses.
    goodput: share of the time that is work which counts.
    seconds: from the first request to the last step, simulated.
    first_step_s, grown_s: until the first step, and until all decoders are there.
    losses: of the group in the run, and `repeated` steps.
    period_steps: the best number of steps between two checkpoints; infinite without losses.
    mtbl_s: mean time between losses of the group.
    cost: USD by purpose; None where a price is not known.
    requests, stored_bytes: of the whole run, from the store.
    memory: peak bytes of a rank; None where they cannot be computed.
    pays: the largest number of ranks that pays, of those in `speeds`.
    speeds: by the number of ranks.
    origin: the least trusted origin of what the rate is made of.
    """

    workload: Workload
    cluster: Cluster
    speed: Speed
    rate: Number
    decode: Number
    steps_s: float
    goodput: float
    seconds: float
    first_step_s: float
    grown_s: float
    losses: float
    repeated: float
    period_steps: float
    mtbl_s: float
    cost: dict[str, float | None]
    requests: float
    stored_bytes: float
    memory: float | None
    pays: int
    speeds: dict[int, Speed]
    origin: Origin


def make_forecast(
    workload: Workload,
    cluster: Cluster,
    numbers: Numbers,
    prices: Prices,
    measured: Measured | None = None,
) -> Forecast:
    """Compute a plan. Raises ConfigError where no rate is known, or the machines can never train."""
    decode = numbers["decode_images_s"]
    if measured and measured.decode_images_s:
        decode = Number(measured.decode_images_s, "measured", measured.run)
    numbers = {**numbers, "decode_images_s": decode}
    speeds = {
        world: _speed(workload, replace(cluster, world=world), numbers, measured)
        for world in sorted({*workload.messages, cluster.world})
        if world % cluster.node.gpus == 0
    }
    speed = speeds[cluster.world]
    if not speed.images_s:
        raise ConfigError(f"{cluster.node_name} has no vCPU to spare for decoding: give --decoders 1 or more")
    step_s = workload.batch / speed.images_s
    scenario = _scenario(workload, cluster, numbers, speed, step_s)
    mtbl_s = 1 / scenario.losses_s if scenario.losses_s else math.inf
    restart_s = scenario.boot_s + scenario.start_s
    useful = goodput(scenario.checkpoint_steps * step_s, scenario.checkpoint_s, mtbl_s, restart_s)
    if useful < LEAST_GOODPUT:
        raise ConfigError(
            f"a node of {cluster.nodes} is lost every {mtbl_s / 60:.0f} min, and a checkpoint comes every "
            f"{scenario.checkpoint_steps * step_s / 60:.0f} min: hardly a step would last. Lower train.checkpoint_every (best: "
            f"{max(1, round(best_period(scenario.checkpoint_s, mtbl_s) / step_s))}), or take fewer nodes, or leave --spot out"
        )
    outcomes = [simulate(scenario, seed) for seed in range(RUNS)]
    images = float(workload.steps * workload.batch)
    source = _source(workload, numbers)
    seconds = statistics.mean(outcome.seconds for outcome in outcomes)
    requests = requests_of(images, source)
    rate = images_of_a_gpu(workload, cluster, numbers, measured)
    return Forecast(
        workload=workload,
        cluster=cluster,
        speed=speed,
        rate=rate,
        decode=decode,
        steps_s=workload.steps * step_s,
        goodput=useful,
        seconds=seconds,
        first_step_s=outcomes[0].first_step_s,
        grown_s=outcomes[0].grown_s,
        losses=statistics.mean(outcome.losses for outcome in outcomes),
        repeated=statistics.mean(outcome.repeated for outcome in outcomes),
        period_steps=best_period(scenario.checkpoint_s, mtbl_s) / step_s,
        mtbl_s=mtbl_s,
        cost=_cost(cluster, prices, speed.decoders, seconds, requests),
        requests=requests,
        stored_bytes=images * _picture(workload, numbers).stored,
        memory=workload.memory,
        pays=largest_that_pays({world: each.images_s for world, each in speeds.items()}),
        speeds=speeds,
        origin=least_trusted([rate.origin, decode.origin, numbers["straggler"].origin]),
    )


def images_of_a_gpu(workload: Workload, cluster: Cluster, numbers: Numbers, measured: Measured | None) -> Number:
    """Images a second of a GPU in the planned steps, without stragglers and collectives."""
    local = workload.local(cluster.world)
    seconds = _compute(workload, cluster, numbers, measured)
    if measured:
        return Number(local / seconds, "measured", f"{measured.run}, {measured.world} ranks")
    return Number(local / seconds, "computed", _mfu(workload, cluster, numbers)[1])


def largest_that_pays(images_s: dict[int, float]) -> int:
    """The largest number of ranks at which a rank makes at least `PAYS` of what it makes at the smallest number, and so does
    every number below.
    """
    worlds = sorted(images_s)
    first = images_s[worlds[0]] / worlds[0]
    pays = worlds[0]
    for world in worlds[1:]:
        if images_s[world] / world < PAYS * first:
            break
        pays = world
    return pays


def _mfu(workload: Workload, cluster: Cluster, numbers: Numbers) -> tuple[Number, str]:
    """The share of the GPU's peak that steps of this kind reach, and words for its origin."""
    parts = "parts" if workload.parts(cluster.world) < workload.local(cluster.world) else "whole"
    mfu = numbers[f"mfu_{parts}{'_compiled' if workload.compiled else ''}"]
    return mfu, f"{100 * mfu.value:.1f} % of the peak, as EVA02-B/16 on an H200"


def _compute(workload: Workload, cluster: Cluster, numbers: Numbers, measured: Measured | None) -> float:
    """Seconds of a rank's computation in a step."""
    local, part = workload.local(cluster.world), workload.parts(cluster.world)
    launch_s = numbers["launch_compiled_s" if workload.compiled else "launch_s"].value
    memory_bytes_s = cluster.gpu.memory_gb_s * 1e9 * numbers["memory_share"].value
    update_s = workload.weights / 4 * numbers["optimizer_bytes"].value / memory_bytes_s
    if measured:
        messages = (
            workload.messages.get(measured.world, next(iter(workload.messages.values()))) if measured.world > 1 else ()
        )
        fabric = cluster.fabric(numbers)
        try:
            seconds = compute_from_step(measured.step_s, messages, measured.world, fabric, numbers["straggler"].value)
        except ValueError as error:
            raise ConfigError(f"{measured.run}: {error}: it ran on other hardware, or is another model") from None
        share = measured.batch / measured.world
        return compute_s(local, min(part, local), share / max(1e-9, seconds - update_s), launch_s, update_s)
    if workload.flops is None:
        raise ConfigError(f"no rate is known for {workload.name} ({workload.uncounted}): give --measured RUN")
    mfu, _ = _mfu(workload, cluster, numbers)
    images = numbers["mfu_images"].value
    at_reference = images * workload.flops / (mfu.value * cluster.gpu.peak_tflops * 1e12)
    return compute_s(local, part, images / max(at_reference - update_s, 0.1 * at_reference), launch_s, update_s)


def _picture(workload: Workload, numbers: Numbers) -> Picture:
    stored = numbers["picture_bytes"].value + workload.text_bytes + numbers["row_bytes"].value
    read = stored * numbers["groups_a_block"].value
    return Picture(read, workload.decoded + workload.text_bytes, numbers["decode_images_s"].value)


def _source(workload: Workload, numbers: Numbers) -> Source:
    return Source(
        block_rows=workload.block_rows,
        groups_a_block=numbers["groups_a_block"].value,
        requests_a_group=numbers["requests_a_group"].value,
        requests_s=numbers["s3_requests_s"].value,
        blocks_s=workload.streams * numbers["blocks_s"].value,
    )


def _speed(workload: Workload, cluster: Cluster, numbers: Numbers, measured: Measured | None) -> Speed:
    compute = _compute(workload, cluster, numbers, measured)
    messages = workload.messages.get(cluster.world, ())
    step = step_time(compute, messages, cluster.world, cluster.fabric(numbers), numbers["straggler"].value)
    picture, wanted = _picture(workload, numbers), workload.batch / step.total
    machines = Machines(
        gpu_nodes=cluster.nodes,
        gpu_vcpus=_spare_vcpus(cluster, numbers),
        gpu_gbit_s=cluster.node.tcp_gbit_s,
        decoders=0,
        decoder_vcpus=cluster.decoder.vcpus,
        decoder_gbit_s=cluster.decoder.tcp_gbit_s,
    )
    needed = decoders_needed(wanted, picture, machines)
    decoders = needed if cluster.decoders is None else min(needed, cluster.decoders)
    machines = replace(machines, decoders=decoders)
    limits = stream_limits(picture, _source(workload, numbers), machines)
    slowest = min(limits, key=lambda name: limits[name])
    if limits[slowest] < wanted:
        return Speed(step, limits, limits[slowest], slowest, decoders)
    bound = COMMUNICATION if step.communication > step.compute else COMPUTE
    return Speed(step, limits, wanted, bound, decoders)


def _spare_vcpus(cluster: Cluster, numbers: Numbers) -> float:
    """vCPUs of a GPU node that decode."""
    return max(0.0, cluster.node.vcpus - cluster.node.gpus * numbers["rank_vcpus"].value)


def _scenario(workload: Workload, cluster: Cluster, numbers: Numbers, speed: Speed, step_s: float) -> Scenario:
    picture = _picture(workload, numbers)
    per_node = numbers["gpu_losses_hour"].value * cluster.node.gpus
    losses_hour = per_node + (numbers["spot_losses_hour"].value if cluster.spot else 0.0)
    mtbl_s = mean_time_between_losses(cluster.nodes, losses_hour)
    return Scenario(
        steps=workload.steps,
        step_s=step_s,
        batch=workload.batch,
        checkpoint_steps=workload.checkpoint_steps,
        checkpoint_s=3 * workload.weights / numbers["checkpoint_bytes_s"].value,
        boot_s=numbers["boot_s"].value,
        start_s=numbers["start_s"].value,
        losses_s=0.0 if math.isinf(mtbl_s) else 1 / mtbl_s,
        decoders=speed.decoders,
        own_images_s=cluster.nodes * _spare_vcpus(cluster, numbers) * picture.decode_images_s,
        decoder_images_s=min(decoder_images_s(picture, cluster.decoder.vcpus, cluster.decoder.tcp_gbit_s).values()),
        request_s=numbers["request_s"].value,
    )


def _cost(cluster: Cluster, prices: Prices, decoders: int, seconds: float, requests: float) -> dict[str, float | None]:
    """USD by purpose."""
    hours = seconds / 3600
    counts = {
        "GPU nodes": (cluster.nodes, node_price(prices, cluster.node_name, cluster.spot)),
        "decoders": (decoders, node_price(prices, cluster.decoder_name, spot=True)),
        "head": (1, node_price(prices, cluster.head_name, spot=False)),
    }
    cost = {name: None if price is None else count * price * hours for name, (count, price) in counts.items()}
    per_1000 = prices.s3_usd_per_1000_requests
    return {**cost, "S3 requests": None if per_1000 is None else requests / 1000 * per_1000}
