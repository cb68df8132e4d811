"""How much memory a training step takes, and what its ranks say to each other, before there is a machine for it.

The vision tower is built without weights and run once, forward and backward, on tensors that have shapes and no memory (torch's
FakeTensorMode): what is alive at each moment is counted as it would be allocated. The rest of a step is counted from its shapes.
Not in it: what the process takes before it has a model (torch alone some 300 MiB), blocks in Ray's object store, and what
torch.compile saves.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.model import refuse_widths
from nev.losses.fused import HALF, PARTIAL_BYTES
from nev.losses.tiles import GPU_TILE_COLUMNS, GPU_TILE_ROWS, TILE_COLUMNS, TILE_ROWS
from nev.models.text import TextTower
from nev.models.vision import VisionTower, build_vision
from nev.train.core.parallel import transformer_blocks
from nev.train.core.vision_setup import apply_train_options

BUCKET_BYTES = 25 * 2**20  # DDP's default
LEAVE = "whether to leave (hosts)"  # nev.train.worker.collectives
FP32, FP16 = 4, 2
# Measured with glibc's allocator and oneDNN (`benchmarks/results/capacity.json`): a share of what is alive, and on a CPU what the
# first step brings for good, libraries and compiled kernels.
SLACK, KERNELS = 0.12, 128 * 2**20


@dataclass(frozen=True)
class Capacity:
    """Bytes of one rank at the peak of a step.

    weights: parameters and buffers; gradients: of all parameters, under DDP its buckets; optimiser: AdamW's two moments; under
    FSDP the rank's part of these three. gathered: what FSDP holds whole besides: the weights outside of all blocks, two
    blocks', and the gradients of one. activations: what the tower keeps for its backward and needs beside, of a micro-batch;
    images: the rank's share of the batch, uint8; embeddings: of the images and of all texts, and their gradients; tiles: of the
    loss. The loss and the tower's backward may not be at their peak together, so `alive` is at most the sum. slack: for what the
    allocator keeps for later and kernels want beside; peak: with it.
    """

    weights: int
    gradients: int
    optimiser: int
    gathered: int
    activations: int
    images: int
    embeddings: int
    tiles: int
    alive: int
    slack: int
    peak: int


MEANING = {
    "weights": "parameters and buffers",
    "gradients": "of all parameters",
    "optimiser": "AdamW's two moments",
    "gathered": "with train.fsdp: what is whole for a while",
    "activations": "kept for the backward of train.micro_batch images",
    "images": "this worker's share of the batch, uint8",
    "embeddings": "of these images and of all texts",
    "tiles": "of the loss",
    "alive": "of these at once, at the most",
    "slack": "for the allocator and kernels",
    "peak": "alive and slack",
}


@dataclass(frozen=True)
class Collective:
    """What is said between the ranks a step: kind, what for, how often, and bytes of the whole buffer in all."""

    kind: str
    what: str
    count: int
    nbytes: int


def estimate_memory(config: Experiment, text_width: int, bf16: bool = False, gpu: bool = False) -> Capacity:
    """The memory of a rank. bf16: under autocast; gpu: the loss as it goes there.

    Raises ConfigError as `build_vision` does, and for a text tower in the loop.
    """
    if config.text_online:
        raise ConfigError(
            "the memory of a text tower in the loop is not told: leave text.mode and lock out for that of the rest"
        )
    refuse_widths(config.loss, text_width)
    world, batch = config.workers.least, config.train.global_batch
    local = config.local_batch(world)
    part = min(config.train.micro_batch or local, local)
    vision = compute_shape(config, text_width)
    apply_train_options(vision, config.train.model_copy(update={"compile": False}))
    weights = sum(tensor.nbytes for tensor in (*vision.parameters(), *vision.buffers()))
    learned = sum(parameter.nbytes for parameter in vision.parameters())
    gathered = 0
    if config.train.fsdp and world > 1:
        blocks, rest = measure_activations(vision)
        gathered = rest + 3 * max(blocks, default=0)
        weights, learned = weights // world, learned // world
    kept, tower = tower_bytes(vision, part, config.data.image_size, bf16)
    images = local * config.data.image_size**2 * 3
    levels = max(1, len(config.loss.matryoshka))
    # The texts as they come (one process has its own alone), log-sum-exps of the columns, and of the images the embedding,
    # its working copy, that times the scale, and the gradient.
    texts = local * text_width * FP16 if world == 1 else batch * (text_width + 1) * FP16 + local * text_width * FP16
    nested = 2 * bool(config.loss.matryoshka)  # segments of the images apart, and their sums
    embeddings = texts + 4 * levels * batch * FP32 + (4 + nested) * local * text_width * FP32
    rows, columns = (GPU_TILE_ROWS, GPU_TILE_COLUMNS) if gpu else (TILE_ROWS, TILE_COLUMNS)
    rows, columns = min(rows, local), min(columns, batch)
    at_once = 2 * levels + 4 if nested else 3 if config.loss.kind == "sigmoid" else 2 + gpu
    tiles = FP32 * (at_once * rows * columns + 2 * columns * text_width + rows * text_width)
    if config.loss.kernel == "fused":
        # The kernels (`nev.losses.fused`): the parts of the columns' sums and as much again meanwhile, images in two fp16
        # parts, and the texts once more, their rows side by side.
        partial = min(PARTIAL_BYTES, math.ceil(local / HALF.rows) * batch * FP32)
        tiles = 2 * partial + FP32 * local * text_width + (world > 1) * FP16 * batch * text_width
    whole = part == local
    # Whole, the loss is taken while all that the backward needs is there; in parts, while nothing of it is.
    at_loss = embeddings + tiles + (kept if whole else 0)
    at_backward = embeddings + tower
    steady = weights + 2 * learned + gathered + images
    # A whole batch's come as the activations go, and are counted with these.
    gradients = learned if world > 1 or not whole else 0
    alive = steady + gradients + max(at_loss, at_backward)
    slack = int(SLACK * alive) + (0 if gpu else KERNELS)
    return Capacity(
        weights=weights,
        gradients=learned,
        optimiser=2 * learned,
        gathered=gathered,
        activations=tower,
        images=images,
        embeddings=embeddings,
        tiles=tiles,
        alive=alive,
        slack=slack,
        peak=alive + slack,
    )


def collectives(config: Experiment, text_width: int) -> list[Collective]:
    """What the ranks say to each other a step. None for a process alone."""
    world, batch, levels = config.workers.least, config.train.global_batch, max(1, len(config.loss.matryoshka))
    if world == 1:
        return []
    texts = Collective("all_gather", "texts", 1, batch * (text_width + 1) * FP16)
    columns = Collective("all_reduce", "columns", 2, (2 * levels * batch + 2) * FP32)
    counts = Collective("all_reduce", "loss and counts", 1, 2 * FP32)
    leave = Collective("all_reduce", LEAVE, 1, 1)
    said = [texts, counts if config.loss.kind == "sigmoid" else columns, leave]
    blocks, rest = measure_activations(compute_shape(config, text_width))
    learned = sum(blocks) + rest
    if not config.train.fsdp:
        return [*said, Collective("all_reduce", "gradients (DDP)", math.ceil(learned / BUCKET_BYTES), learned)]
    parts = max(1, config.local_batch(world) // (config.train.micro_batch or batch))
    passes = parts * (3 if parts > 1 else 2)  # a part is embedded twice, and has a backward: each gathers its blocks
    return [
        *said,
        Collective("all_gather", "weights (FSDP)", len(blocks) * passes + parts, sum(blocks) * passes + rest * parts),
        Collective("reduce_scatter", "gradients (FSDP)", (len(blocks) + 1) * parts, learned * parts),
        Collective("all_reduce", "norm of the gradients", 1, FP32),
        Collective("all_reduce", "gradient of the scale", 1, FP32 * (2 if config.loss.kind == "sigmoid" else 1)),
    ]


def compute_shape(config: Experiment, text_width: int) -> VisionTower:
    """The vision tower without its numbers."""
    empty = config.vision.model_copy(update={"pretrained": False, "weights": None})
    with torch.device("meta"):
        return build_vision(empty, config.data.image_size, text_width).train()


def checkpoint_bytes(config: Experiment, text: TextTower) -> int:
    """About what a checkpoint takes: weights in float32, and AdamW's two moments of those that are trained."""
    vision, words = _tower_weights(config, text)
    return vision * (1 if config.lock == "image" else 3) + 3 * words


def weight_bytes(config: Experiment, text: TextTower) -> int:
    """About what the weights in a checkpoint take, in float32."""
    return sum(_tower_weights(config, text))


def _tower_weights(config: Experiment, text: TextTower) -> tuple[int, int]:
    """Bytes of the vision and of the text tower's weights in a checkpoint. A locked text tower is in no checkpoint."""
    vision = sum(tensor.nbytes for tensor in compute_shape(config, text.width).parameters())
    words = sum(tensor.nbytes for tensor in text.model.parameters()) if config.lock != "text" else 0
    return vision, words


def measure_activations(vision: VisionTower) -> tuple[list[int], int]:
    """(bytes of each block that FSDP gathers in one piece, bytes of the parameters outside of all)."""
    seen: set[nn.Parameter] = set()
    blocks = []
    for block in reversed(transformer_blocks(vision)):
        own = set(block.parameters()) - seen
        blocks.append(sum(parameter.nbytes for parameter in own))
        seen |= own
    return blocks, sum(parameter.nbytes for parameter in vision.parameters() if parameter not in seen)


def tower_bytes(vision: VisionTower, rows: int, size: int, bf16: bool) -> tuple[int, int]:
    """(what it keeps for its backward, its peak) over a forward and backward of `rows` images beyond its weights, in bytes."""
    with FakeTensorMode():
        _without_memory(vision)
        live = Live()
        for tensor in (*vision.parameters(), *vision.buffers()):
            live.track(tensor)
        weights = live.now
        with live:
            pixels = torch.empty(rows, size, size, 3).permute(0, 3, 1, 2)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                vectors = vision(pixels)
            kept = live.now - weights
            torch.autograd.backward(vectors, torch.empty_like(vectors))
        return kept, live.peak - weights


def _without_memory(module: nn.Module) -> None:
    """Give every parameter and buffer a shape on the CPU, and nothing behind it."""
    for one in module.modules():
        for name, parameter in one._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                one._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in one._buffers.items():
            if buffer is not None:
                one._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that are alive, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def track(self, tensor: Tensor) -> None:
        """Count the memory of a tensor until it goes, once."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, nbytes: int) -> None:
        self.now -= nbytes

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it gives."""
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.track(leaf)
        return found


def memory_table(found: Capacity) -> list[tuple[str, int]]:
    """The parts in the order of `Capacity`, the peak last."""
    return [(field.name, getattr(found, field.name)) for field in fields(found)]
