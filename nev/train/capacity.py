"""Memory and collectives of a training step, computed without the machine that will run it.

The vision tower is built without weights and run once, forward and backward, on tensors that have shapes and no memory (torch's
FakeTensorMode). Live bytes are counted as they would be allocated. The rest of a step is computed from its shapes.
Not counted: the memory of a process before it builds a model (torch alone takes some 300 MiB), blocks in Ray's object store, and
what torch.compile saves.
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
from nev.losses.tiles import CACHED_TILES, GPU_TILE_COLUMNS, GPU_TILE_ROWS, TILE_COLUMNS, TILE_ROWS
from nev.models.frozen import FeatureHead, build_feature_head, describe_features
from nev.models.text import TextTower
from nev.models.trunk import build_trunk
from nev.models.vision import VisionTower, build_vision
from nev.train.core.parallel import transformer_blocks
from nev.train.core.vision_setup import apply_train_options

BUCKET_BYTES = 25 * 2**20  # DDP's default
STOP = "whether to stop (hosts)"  # nev.train.worker.collectives.StopConsensus
FP32, FP16 = 4, 2
# Measured with glibc's allocator and oneDNN (`benchmarks/results/capacity.json`). SLACK: share of the live bytes. KERNELS: bytes
# of libraries and compiled kernels that the first step of a CPU leaves.
SLACK, KERNELS = 0.12, 128 * 2**20


@dataclass(frozen=True)
class Capacity:
    """Bytes of one rank at the peak of a step.

    weights: parameters and buffers; under FSDP the rank's part.
    gradients: of all parameters, under DDP its buckets; under FSDP the rank's part.
    optimiser: AdamW's two moments; under FSDP the rank's part.
    gathered: whole tensors under FSDP: the weights outside of all blocks, the weights of two blocks, the gradients of one block.
    activations: of the tower for a micro-batch, at their peak.
    images: the rank's share of the batch: uint8, or features of a locked trunk in float16.
    embeddings: of the images and of all texts, with gradients.
    tiles: of the loss.
    alive: the most live bytes. The loss and the tower's backward peak at different times, so this may be less than the sum.
    slack: for the allocator's cache and for workspaces of kernels.
    peak: alive and slack.
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
    "gathered": "with train.fsdp: tensors that are whole for a while",
    "activations": "kept for the backward of train.micro_batch images",
    "images": "this worker's share of the batch: pixels in uint8, or features of a locked trunk in float16",
    "embeddings": "of these images and of all texts",
    "tiles": "of the loss",
    "alive": "the most of these at one time",
    "slack": "for the allocator and kernels",
    "peak": "alive and slack",
}


@dataclass(frozen=True)
class Collective:
    """A kind of message between the ranks.

    kind: the operation, as `all_reduce`.
    purpose: what is sent.
    count: calls a step.
    nbytes: bytes of the whole buffers of these calls.
    """

    kind: str
    purpose: str
    count: int
    nbytes: int


def estimate_memory(config: Experiment, text_width: int, bf16: bool = False, gpu: bool = False) -> Capacity:
    """The memory of a rank at the peak of a step.

    text_width: width D of the text vectors.
    bf16: the towers run in bfloat16.
    gpu: the loss has the tile sizes of a GPU.
    Raises ConfigError as `build_vision` does, and for a text tower in the loop.
    """
    if config.vision.lock and not config.vision.from_sidecars:
        raise ConfigError(
            "the memory of a locked trunk in the loop cannot be computed: leave out vision.mode for the memory of the rest"
        )
    if config.text_online:
        raise ConfigError(
            "the memory of a text tower in the loop cannot be computed: leave out text.mode and lock for the memory of the rest"
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
    picture = picture_shape(config)
    for_backward, tower = tower_bytes(vision, (part, *picture), bf16)
    images = local * math.prod(picture) * (FP16 if config.vision.lock else 1)
    levels = max(1, len(config.loss.matryoshka))
    # Texts as gathered (one process has only its own), log-sum-exps of the columns; for the images the embedding, its working
    # copy, the copy times the scale, and the gradient.
    texts = local * text_width * FP16 if world == 1 else batch * (text_width + 1) * FP16 + local * text_width * FP16
    nested = 2 * bool(config.loss.matryoshka)  # segments of the images, and their sums
    embeddings = texts + 4 * levels * batch * FP32 + (4 + nested) * local * text_width * FP32
    rows, columns = (GPU_TILE_ROWS, GPU_TILE_COLUMNS) if gpu else (TILE_ROWS, TILE_COLUMNS)
    # On a CPU the loss keeps the exponentials of its first tiles.
    cached = 0 if gpu or nested or config.loss.kind == "sigmoid" else min(CACHED_TILES * rows * columns, local * batch)
    rows, columns = min(rows, local), min(columns, batch)
    at_once = 2 * levels + 4 if nested else 3 if config.loss.kind == "sigmoid" else 3 if gpu else 1
    tiles = FP32 * (cached + at_once * rows * columns + 2 * columns * text_width + rows * text_width)
    if config.loss.kernel == "fused":
        # The kernels (`nev.losses.fused`): partial sums of the columns, twice; images in two fp16 parts; a contiguous copy of
        # the texts.
        partial = min(PARTIAL_BYTES, math.ceil(local / HALF.rows) * batch * FP32)
        tiles = 2 * partial + FP32 * local * text_width + (world > 1) * FP16 * batch * text_width
    one_part = part == local
    # With a whole batch the activations are alive during the loss; with a batch in parts they are not.
    at_loss = embeddings + tiles + (for_backward if one_part else 0)
    at_backward = embeddings + tower
    steady = weights + 2 * learned + gathered + images
    # The gradients of a whole batch grow as the activations shrink, and are counted with the activations.
    gradients = learned if world > 1 or not one_part else 0
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
    """The collectives of a step; none where W = 1."""
    world, batch, levels = config.workers.least, config.train.global_batch, max(1, len(config.loss.matryoshka))
    if world == 1:
        return []
    texts = Collective("all_gather", "texts", 1, batch * (text_width + 1) * FP16)
    columns = Collective("all_reduce", "columns", 2, (2 * levels * batch + 2) * FP32)
    counts = Collective("all_reduce", "loss and counts", 1, 2 * FP32)
    stop = Collective("all_reduce", STOP, 1, 1)
    always = [texts, counts if config.loss.kind == "sigmoid" else columns, stop]
    blocks, rest = measure_activations(compute_shape(config, text_width))
    learned = sum(blocks) + rest
    if not config.train.fsdp:
        return [*always, Collective("all_reduce", "gradients (DDP)", math.ceil(learned / BUCKET_BYTES), learned)]
    parts = max(1, config.local_batch(world) // (config.train.micro_batch or batch))
    passes = parts * (3 if parts > 1 else 2)  # a part has two forwards and a backward, and each gathers the blocks
    return [
        *always,
        Collective("all_gather", "weights (FSDP)", len(blocks) * passes + parts, sum(blocks) * passes + rest * parts),
        Collective("reduce_scatter", "gradients (FSDP)", (len(blocks) + 1) * parts, learned * parts),
        Collective("all_reduce", "norm of the gradients", 1, FP32),
        Collective("all_reduce", "gradient of the scale", 1, FP32 * (2 if config.loss.kind == "sigmoid" else 1)),
    ]


def compute_shape(config: Experiment, text_width: int) -> VisionTower | FeatureHead:
    """The vision tower, or the layers behind a locked trunk, on the meta device: shapes without memory."""
    if config.vision.lock:
        shape = describe_features(config.vision, config.data.image_size)
        with torch.device("meta"):
            return build_feature_head(config.vision, config.data.image_size, shape, text_width).train()
    empty = config.vision.model_copy(update={"pretrained": False, "weights": None})
    with torch.device("meta"):
        return build_vision(empty, config.data.image_size, text_width).train()


def checkpoint_bytes(config: Experiment, text: TextTower) -> int:
    """Bytes of a checkpoint, about: weights in float32, and AdamW's two moments of the trained weights."""
    vision, words = _tower_weights(config, text)
    return vision * (1 if config.lock == "image" else 3) + 3 * words + _trunk_bytes(config)


def weight_bytes(config: Experiment, text: TextTower) -> int:
    """Bytes of the weights in a checkpoint, about, in float32."""
    return sum(_tower_weights(config, text)) + _trunk_bytes(config)


def _tower_weights(config: Experiment, text: TextTower) -> tuple[int, int]:
    """Bytes of the vision and of the text tower's weights in a checkpoint. A locked text tower is in no checkpoint."""
    vision = sum(tensor.nbytes for tensor in compute_shape(config, text.width).parameters())
    words = sum(tensor.nbytes for tensor in text.model.parameters()) if config.lock != "text" else 0
    return vision, words


def _trunk_bytes(config: Experiment) -> int:
    """Bytes of a locked trunk's weights in a checkpoint; 0 where a checkpoint names the trunk by fingerprint."""
    if not (config.vision.lock and config.train.save_trunk):
        return 0
    with torch.device("meta"):
        trunk = build_trunk(config.vision.model_copy(update={"pretrained": False}), config.data.image_size)
    return sum(tensor.nbytes for tensor in trunk.parameters())


def measure_activations(vision: nn.Module) -> tuple[list[int], int]:
    """(bytes of each block that FSDP gathers in one piece, bytes of the parameters outside of all blocks)."""
    counted: set[nn.Parameter] = set()
    blocks = []
    for block in reversed(transformer_blocks(vision)):
        parameters = set(block.parameters()) - counted
        blocks.append(sum(parameter.nbytes for parameter in parameters))
        counted |= parameters
    return blocks, sum(parameter.nbytes for parameter in vision.parameters() if parameter not in counted)


def picture_shape(config: Experiment) -> tuple[int, ...]:
    """Shape of what the trained tower takes of a picture: its pixels, or the features of a locked trunk."""
    if config.vision.lock:
        return describe_features(config.vision, config.data.image_size)
    return config.data.image_size, config.data.image_size, 3


def tower_bytes(vision: nn.Module, shape: tuple[int, ...], bf16: bool) -> tuple[int, int]:
    """(bytes stored for the backward, peak bytes) of a forward and backward, without the weights.

    shape: of what the tower takes, with the number of pictures first.
    """
    with FakeTensorMode():
        _without_memory(vision)
        live = LiveBytes()
        for tensor in (*vision.parameters(), *vision.buffers()):
            live.track(tensor)
        weights = live.now
        with live:
            pixels = torch.empty(shape)
            pixels = pixels.permute(0, 3, 1, 2) if isinstance(vision, VisionTower) else pixels
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                vectors = vision(pixels)
            for_backward = live.now - weights
            torch.autograd.backward(vectors, torch.empty_like(vectors))
        return for_backward, live.peak - weights


def _without_memory(module: nn.Module) -> None:
    """Replace every parameter and buffer by a fake tensor on the CPU. Called under FakeTensorMode."""
    for layer in module.modules():
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                layer._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in layer._buffers.items():
            if buffer is not None:
                layer._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the live bytes of tensors. now: at this moment. peak: the most so far."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def track(self, tensor: Tensor) -> None:
        """Count the memory of a tensor until it is freed; a storage of several tensors counts once."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, nbytes: int) -> None:
        self.now -= nbytes

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and track its results."""
        results = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor):
                self.track(leaf)
        return results


def memory_table(capacity: Capacity) -> list[tuple[str, int]]:
    """(name, bytes) of the fields of `Capacity`, the peak last."""
    return [(field.name, getattr(capacity, field.name)) for field in fields(capacity)]
