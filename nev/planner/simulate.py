"""A run as a sequence of events, for what formulas cannot say: the cold start, decoders that come one after another, losses.

Between two events the rate is constant, so that time jumps from event to event: a start of the group, a decoder, a request
for decoders, a loss.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Scenario:
    """A run to simulate.

    steps: of the run.
    step_s: of a step where no picture is waited for.
    batch: images of a step.
    checkpoint_steps, checkpoint_s: steps between two checkpoints, and the time that one takes from training.
    boot_s: from a request to a node that takes work.
    start_s: from the group's nodes to the first step.
    losses_s: losses of a node of the group, a second.
    decoders: that are wanted.
    own_images_s: images a second that the GPU nodes decode; decoder_images_s: that a decoder does.
    request_s: seconds between two requests for decoders, each for up to twice the vCPUs.
    """

    steps: int
    step_s: float
    batch: int
    checkpoint_steps: int
    checkpoint_s: float
    boot_s: float
    start_s: float
    losses_s: float
    decoders: int
    own_images_s: float
    decoder_images_s: float
    request_s: float


@dataclass(frozen=True)
class Outcome:
    """What a simulated run took.

    seconds: from the first request to the last step.
    first_step_s: until the first step begins.
    grown_s: until all wanted decoders are there; 0 without decoders.
    losses: of the group.
    repeated: steps that were done again.
    """

    seconds: float
    first_step_s: float
    grown_s: float
    losses: int
    repeated: float


def simulate(run: Scenario, seed: int) -> Outcome:
    """Run the events of a scenario until its last step."""
    draw = random.Random(seed)
    events: list[tuple[float, int, str, int]] = []
    order = itertools.count()

    def add(time: float, kind: str, attempt: int = 0) -> None:
        if math.isfinite(time):
            heapq.heappush(events, (time, next(order), kind, attempt))

    def next_loss() -> float:
        return draw.expovariate(run.losses_s) if run.losses_s else math.inf

    now = done = repeated = grown = 0.0
    losses = requested = up = 0
    training = False
    first = run.boot_s + run.start_s
    add(first, "start")
    while True:
        time, _, kind, attempt = heapq.heappop(events) if events else (math.inf, 0, "", 0)
        if training:
            decoded = run.own_images_s + up * run.decoder_images_s
            data_s = run.batch / decoded if decoded else math.inf
            pace = max(run.step_s, data_s) + run.checkpoint_s / run.checkpoint_steps
            end = now + (run.steps - done) * pace
            if end <= time:
                return Outcome(end, first, grown, losses, repeated)
            done += (time - now) / pace
        now = time
        if kind == "start" and attempt == losses:  # else a node was lost while the group started
            training = True
            if not attempt:
                add(now + next_loss(), "loss")
                add(now if run.decoders else math.inf, "request")
        elif kind == "loss":
            losses, training = losses + 1, False
            saved = done // run.checkpoint_steps * run.checkpoint_steps
            done, repeated = saved, repeated + done - saved
            add(now + run.boot_s + run.start_s, "start", losses)
            add(now + next_loss(), "loss")
        elif kind == "request":
            more = min(max(1, requested), run.decoders - requested)
            for _ in range(more):
                add(now + run.boot_s, "decoder")
            requested += more
            if requested < run.decoders:
                add(now + run.request_s, "request")
        elif kind == "decoder":
            up += 1
            grown = now if up == run.decoders else grown
