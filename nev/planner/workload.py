"""What a config asks of each step: FLOPs, bytes, collectives, steps. The tower is built on tensors without memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.planner.network import Message

# Collectives that run beside computation: gradients and weights during forward and backward, texts during the forward.
HIDDEN = ("gradients (DDP)", "gradients (FSDP)", "weights (FSDP)", "texts")


@dataclass(frozen=True)
class Workload:
    """An experiment in numbers.

    name: of the experiment.
    batch: images of a step, B.
    block_rows: rows of a block, R.
    part: images that a rank embeds at a time; None for all.
    compiled: whether torch.compile is on.
    rows: of an epoch; None where the length is given in steps or samples.
    steps: of the run.
    checkpoint_steps: between two checkpoints.
    flops: of a forward and backward for an image; None where they cannot be counted, with the reason in `uncounted`.
    weights: bytes of the trained weights.
    decoded: bytes of a row of a block.
    text_bytes: of a row's text vector.
    messages: collectives of a step by the number of ranks.
    memory: peak bytes of a planned rank; None where they cannot be computed.
    uncounted: why FLOPs or memory are missing; "".
    """

    name: str
    batch: int
    block_rows: int
    streams: int
    part: int | None
    compiled: bool
    rows: int | None
    steps: int
    checkpoint_steps: int
    flops: float | None
    weights: float
    decoded: float
    text_bytes: float
    messages: Mapping[int, tuple[Message, ...]]
    memory: float | None
    uncounted: str = ""

    def local(self, world: int) -> int:
        """Images of a rank."""
        return -(-self.batch // self.block_rows // world) * self.block_rows

    def parts(self, world: int) -> int:
        """Images that a rank embeds at a time."""
        return min(self.part or self.local(world), self.local(world))


def with_workers(world: int) -> list[str]:
    """The overrides of a config for a rank on each of `world` GPUs."""
    return [f"workers.count={world}", "workers.min=null", "workers.max=null", "workers.gpus=1"]


def count_steps(config: Experiment, rows: int | None) -> int:
    """Steps of a run. rows: of an epoch. Raises ConfigError where they are needed and not given, or less than a batch."""
    train = config.train
    if train.steps is not None:
        return train.steps
    if train.samples is not None:
        return -(-train.samples // train.global_batch)
    if rows is None:
        raise ConfigError(
            "train.epochs counts epochs, and the rows of data.train are not known here: give them with --rows, or set "
            "train.steps or train.samples. Of several sets they are each set's rows times its epochs"
        )
    if rows < train.global_batch:
        raise ConfigError(f"--rows {rows} is less than a step of train.global_batch = {train.global_batch}")
    assert train.epochs is not None
    if config.data.set_names:  # an epoch of a mixture does not end with a step
        return train.epochs * rows // train.global_batch
    return train.epochs * (rows // train.global_batch)


def possible_worlds(batch: int, block_rows: int, gpus: int) -> list[int]:
    """Numbers of ranks that fill whole nodes of `gpus` GPUs and divide the blocks of a step: the node doubled, and so on."""
    blocks, worlds, world = batch // block_rows, [], gpus
    while world <= blocks:
        if blocks % world == 0:
            worlds.append(world)
        world *= 2
    return worlds


def read_workload(
    config: Experiment, text_width: int, rows: int | None, worlds: Iterable[int], world: int, hidden: float
) -> Workload:
    """The numbers of an experiment.

    text_width: of a text vector.
    rows: of an epoch; None where the config's length does not need them.
    worlds: numbers of ranks, each of which divides the batch.
    world: the planned one of them, for which the memory is computed.
    hidden: share of the collectives of `HIDDEN` that computation hides.
    """
    steps = count_steps(config, rows)
    from nev.train.capacity import FP16, compute_shape, estimate_memory, picture_shape
    from nev.train.flops import count_flops

    bf16 = config.train.precision != "fp32"
    messages: dict[int, tuple[Message, ...]] = {}
    memory, uncounted = None, ""
    for count in worlds:
        settings = config.workers.model_copy(update={"count": count, "min": None, "max": None, "gpus": 1.0})
        with_count = config.model_copy(update={"workers": settings})
        same = next((known for known in messages if known > 1 < count and not config.train.fsdp), None)
        messages[count] = messages[same] if same else _read_messages(with_count, text_width, hidden)
        if count == world:
            try:
                memory = float(estimate_memory(with_count, text_width, bf16, gpu=True).peak)
            except ConfigError as error:
                uncounted = str(error)
    if not (uncounted or bf16):
        uncounted = "train.precision is fp32, and a share of the peak is known for bf16 alone"
    shape = compute_shape(config, text_width)
    numbers = 1
    for side in picture_shape(config):
        numbers *= side
    return Workload(
        name=config.name,
        batch=config.train.global_batch,
        block_rows=config.data.block_rows,
        streams=config.data.streams,
        part=config.train.micro_batch,
        compiled=config.train.compile,
        rows=rows,
        steps=steps,
        checkpoint_steps=config.train.checkpoint_every,
        flops=None if uncounted else count_flops(config, text_width),
        weights=float(sum(parameter.nbytes for parameter in shape.parameters())),
        decoded=float(numbers * (FP16 if config.vision.from_sidecars else 1)),
        text_bytes=float(text_width * FP16),
        messages=messages,
        memory=memory,
        uncounted=uncounted,
    )


def _read_messages(config: Experiment, text_width: int, hidden: float) -> tuple[Message, ...]:
    """The collectives of a step. Without FSDP they are the same for all numbers of ranks above one."""
    from nev.train.capacity import collectives

    return tuple(
        Message(each.kind, each.purpose, each.count, each.nbytes, hidden if each.purpose in HIDDEN else 0.0)
        for each in collectives(config, text_width)
    )
