"""The same application in several processes, on one machine or more: Ray Serve."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from nev.cluster.session import connect
from nev.serve.server import GRACE_SECONDS, ServeError

if TYPE_CHECKING:
    from fastapi import FastAPI

APPLICATION = "nev"
RETRY_SECONDS = 2.0  # a caller is told to wait, where all replicas have as much as they take
HEALTH_SECONDS = 10.0
CONTROLLER = "SERVE_CONTROLLER_ACTOR"  # Ray Serve's name for it
OPEN_PORTS = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_ENABLE_DIRECT_INGRESS", "RAY_SERVE_THROUGHPUT_OPTIMIZED")


class Scale(NamedTuple):
    """How many replicas: as many as the load needs, between `least` and `most`."""

    least: int
    most: int


def parse_scale(replicas: int | None, autoscale: str | None) -> Scale | None:
    """The options `--replicas N` and `--autoscale MIN:MAX`. None: neither. Raises ServeError."""
    if autoscale is None:
        return None if replicas is None else Scale(replicas, replicas)
    least, _, most = autoscale.partition(":")
    if replicas is not None or not (least.isdecimal() and most.isdecimal() and 0 < int(least) <= int(most)):
        raise ServeError(f"--autoscale {autoscale!r}: MIN:MAX, from 1, such as 1:4, and without --replicas")
    return Scale(int(least), int(most))


def start_replicas(
    open_app: Callable[[], FastAPI], scale: Scale, host: str, port: int, max_waiting: int, cpus: float, gpus: float
) -> None:
    """Start replicas, and return when all of the least number answer.

    open_app: makes the application; called in each replica.
    max_waiting: requests that a replica has at once; beyond, and as many again in front, is answered with 429.
    cpus, gpus: of a replica.
    Raises ServeError where ray[serve] is not installed, or the replicas do not start.
    """
    try:
        from ray import serve
        from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions
        from ray.serve.exceptions import RayServeException
    except ImportError as error:
        raise ServeError(f"replicas need ray[serve]: pip install 'nev[replicas]' ({error})") from error

    _refuse_open_ports(os.environ)
    connect()
    _refuse_running_serve()

    @serve.ingress()
    class Replica:
        """Opens the application in its own process, and is replaced where the model fails."""

        def __init__(self) -> None:
            self.opened = open_app()

        def __serve_build_asgi_app__(self) -> FastAPI:
            return self.opened

        async def check_health(self) -> None:
            await self.opened.state.service.check_health()

    size: dict[str, Any] = {"num_replicas": scale.least}
    if scale.most > scale.least:
        busy = max(1, max_waiting // 8)
        size = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=scale.least, max_replicas=scale.most, target_ongoing_requests=busy
            )
        }
    deploy: Any = serve.deployment(
        name=APPLICATION,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=max_waiting,
        max_queued_requests=max_waiting,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_SECONDS),
        graceful_shutdown_timeout_s=GRACE_SECONDS,
        health_check_period_s=HEALTH_SECONDS,
        logging_config={"enable_access_log": False, "log_level": "ERROR"},
        **size,
    )
    serve.start(http_options=HTTPOptions(host=host, port=port), logging_config={"log_level": "ERROR"})
    try:
        serve.run(deploy(Replica).bind(), name=APPLICATION, route_prefix="/")
    except (RayServeException, RuntimeError) as error:
        raise ServeError(f"the replicas do not start: {error}") from error


def _refuse_open_ports(environment: Mapping[str, str]) -> None:
    """Raise ServeError for settings of Ray Serve that let replicas listen on all interfaces, whatever the host is."""
    if opening := [name for name in OPEN_PORTS if environment.get(name, "0") != "0"]:
        raise ServeError(
            f"{', '.join(opening)}: Ray Serve would listen on all interfaces, whatever --host says. Unset it"
        )


def _refuse_running_serve() -> None:
    """Raise ServeError where the cluster has a Ray Serve: it keeps its own address, and would end with this server."""
    import ray

    try:
        ray.get_actor(CONTROLLER, namespace="serve")
    except ValueError:
        return
    raise ServeError("Ray Serve runs on this cluster already, at an address of its own. End it first: serve shutdown")


def stop_replicas() -> None:
    """End the replicas, after they have answered what they have."""
    from ray import serve

    serve.shutdown()  # type: ignore[no-untyped-call]
