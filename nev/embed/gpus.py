"""The GPUs of an embedding command: how many it uses, and the wait for the first one where they are yet to start."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from nev.cluster.session import cluster_gpus, may_grow
from nev.cluster.waiting import wait_for_room
from nev.common.progress import throttle
from nev.config.base import ConfigError


def choose_gpus(gpus: int | None) -> int:
    """The number of GPUs to use: `gpus`, or without a choice those that are up now. Needs a connected Ray.

    Raises ConfigError for more GPUs than a Ray that cannot grow has.
    """
    available = cluster_gpus()
    if gpus is None:
        return available
    if gpus > available and not may_grow():
        raise ConfigError(
            f"this machine has {available} GPUs, not {gpus}: leave --gpus out, or submit this to a cluster"
        )
    return gpus


def wait_for_gpu(gpus: int, console: Console) -> None:
    """Where no GPU is up, request `gpus` GPUs and wait until one is up. The console says since when, and which nodes start.

    gpus: those that have work; 0 requests nothing.
    """
    if not gpus or cluster_gpus():
        return

    def print_line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(text: str) -> None:
        console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)

    remedy = "lower --gpus, or leave it out to embed on CPUs"
    with console.status("") as status:
        tell = (lambda text: status.update(escape(text))) if console.is_terminal else throttle(print_line)
        wait_for_room([[{"GPU": 1.0}]] * gpus, tell, warn, lambda: cluster_gpus() > 0, remedy)
