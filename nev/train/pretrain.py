"""Pretraining of a trunk without texts, for `vision.weights` of a run: supervised, or masked image modelling.

Supervised: cross-entropy over a linear layer on the mean token. Masked image modelling: SimMIM (Xie et al. 2022) replaces
patches by a learned token and regresses their pixels by a linear layer; the loss is the mean absolute error of masked patches.
One process trains, on a GPU of this machine if there is one; pictures come from the same stream as in training.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import save
from torch import Tensor, nn

from nev.common.progress import progress
from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.paths import with_absolute_paths
from nev.data.augment import seeded_random
from nev.data.block import Block, BlockReader
from nev.data.block_plan import BlockPlan, sequential_blocks
from nev.data.index import Index, build_index
from nev.data.shard_labels import read_shard_labels
from nev.eval.validation.task import val_reader
from nev.models.precision import choose_precision
from nev.models.vision import VisionTower, build_vision, normalise
from nev.runs.tracking import open_run, tracking_uri
from nev.storage.files import join, storage_errors_as, write_atomic
from nev.storage.reading import DataError
from nev.train.core.optim import make_optimizer, set_learning_rate
from nev.train.core.schedule import learning_rate
from nev.train.core.step import update_parameters
from nev.train.driver.setup import make_plan, total_steps

Objective = Literal["supervised", "mim"]
MASKED = 0.6  # share of the patches, as in SimMIM


class Pretrained(NamedTuple):
    """A pretrained trunk.

    weights: location of the weights (safetensors, timm's names).
    metrics: on `data.val`; empty without a validation set.
    """

    weights: str
    metrics: dict[str, float]


def pretrain(config: Experiment, objective: Objective, console: Console) -> Pretrained:
    """Train the trunk of `config` on the pictures of `data.train`, with the length, precision and optimiser of the config.

    Writes `<output>/<name>-<objective>/trunk.safetensors`, and logs to an MLflow run of that name.
    Raises ConfigError for a trunk without patches to mask, DataError for a supervised objective on a set without labels.
    """
    from nev.cluster.session import connect

    config = with_absolute_paths(config)
    torch.manual_seed(config.seed)
    index = build_index(*config.data.only_set("nev pretrain"))
    tower = build_vision(config.vision.model_copy(update={"pool": "mean"}), config.data.image_size, 1)
    plan = make_plan(config, [index])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = (
        Classifier(tower, read_classes(index))
        if objective == "supervised"
        else Inpainter(tower, config.data.image_size)
    )
    model.to(device)
    reader = BlockReader(
        index, config.data.image_size, config.data.limits, config.seed, config.data.augment, with_labels=True
    )
    folder, uri = join(config.output, f"{config.name}-{objective}"), tracking_uri(config.tracking, config.output)
    connect()
    tags = {"nev.kind": "pretrain", "nev.objective": objective, "nev.data_fingerprint": index.fingerprint}
    tracker = open_run(uri, config.tracking.experiment, f"{config.name}-{objective}", config, tags, config.output)
    status = "FAILED"
    try:
        steps = total_steps(config, plan)
        train_objective(config, model, stream(reader, plan, steps), steps, device, tracker.log, console)
        metrics = score_objective(config, model, device) if config.data.val else {}
        tracker.log(steps, metrics)
        weights = join(folder, "trunk.safetensors")
        with storage_errors_as(weights, "written"):
            write_atomic(
                weights, save({name: tensor.cpu().contiguous() for name, tensor in tower.trunk.state_dict().items()})
            )
        status = "FINISHED"
    finally:
        tracker.finish(status)
    return Pretrained(weights, metrics)


class Classifier(nn.Module):
    """A trunk with a linear layer over classes; the loss is cross-entropy."""

    def __init__(self, tower: VisionTower, classes: int) -> None:
        super().__init__()
        self.trunk, self.tokens = tower.trunk, tower.tokens
        self.classes = nn.Linear(tower.trunk.num_features, classes)

    def scores(self, images: Tensor) -> Tensor:
        """Scores of the classes: float [b, 3, H, W] -> [b, classes]."""
        scores: Tensor = self.classes(self.tokens(images).mean(1))
        return scores

    def forward(self, images: Tensor, labels: Tensor, random: torch.Generator) -> Tensor:
        """The loss, 0-d. labels: int64 [b]."""
        return F.cross_entropy(self.scores(images), labels)

    def metrics(self, images: Tensor, labels: Tensor, random: torch.Generator) -> dict[str, Tensor]:
        """For each picture, float [b]: 1 where its class scores highest."""
        return {"pretrain/top1": (self.scores(images).argmax(1) == labels).float()}


class Inpainter(nn.Module):
    """A trunk with a linear layer to pixels; the loss is the mean absolute error of masked patches (SimMIM).

    Raises ConfigError for a trunk without patches.
    """

    def __init__(self, tower: VisionTower, image_size: int) -> None:
        super().__init__()
        self.trunk, self.tokens = tower.trunk, tower.tokens
        patches = getattr(self.trunk, "patch_embed", None)
        if patches is None or not hasattr(patches, "patch_size"):
            raise ConfigError(
                f"vision.trunk {tower.config.trunk!r} has no patches to mask: choose a vision transformer for --objective mim"
            )
        self.patch = int(patches.patch_size[0])
        self.count = (image_size // self.patch) ** 2
        width = self.trunk.num_features
        self.mask_token = nn.Parameter(torch.zeros(width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.pixels = nn.Linear(width, 3 * self.patch**2)
        self._masked: Tensor | None = None
        patches.register_forward_hook(self._replace_masked)

    def _replace_masked(self, module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
        assert self._masked is not None
        masked = self._masked.view(*embedded.shape[:-1], 1)
        return torch.where(masked, self.mask_token.to(embedded.dtype), embedded)

    def errors(self, images: Tensor, random: torch.Generator) -> Tensor:
        """The mean absolute error of each picture's masked patches: float [b, 3, H, W] -> [b]. random: draws the masks."""
        keep = torch.rand(len(images), self.count, generator=random).argsort(1) >= round(MASKED * self.count)
        self._masked = ~keep.to(images.device)
        tokens = self.tokens(images)[:, -self.count :]  # class and register tokens come before the patches
        target = F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        error = (self.pixels(tokens) - target).abs().mean(2)
        errors: Tensor = (error * self._masked).sum(1) / self._masked.sum(1)
        return errors

    def forward(self, images: Tensor, labels: Tensor, random: torch.Generator) -> Tensor:
        """The loss, 0-d. random: draws the masks."""
        return self.errors(images, random).mean()

    def metrics(self, images: Tensor, labels: Tensor, random: torch.Generator) -> dict[str, Tensor]:
        """For each picture, float [b]: the error of its masked patches."""
        return {"pretrain/mim_error": self.errors(images, random)}


def train_objective(
    config: Experiment,
    model: Classifier | Inpainter,
    blocks: Iterator[Block],
    steps: int,
    device: torch.device,
    log: Callable[[int, dict[str, float]], None],
    console: Console,
) -> None:
    """Train `model` in place for `steps` steps of `train.global_batch` pictures.

    log: called with a step and its metrics, every `train.log_every` steps.
    Raises ConfigError where the loss of such a step is not finite.
    """
    optimizer = make_optimizer(model, config.optim)
    precision = choose_precision(config.train.precision, device)
    parts = config.train.global_batch // config.data.block_rows
    model.train()
    with progress(console) as show:
        for step in range(steps):
            images, labels = load_batch(list(itertools.islice(blocks, parts)), model, config, device)
            set_learning_rate(optimizer, learning_rate(step, steps, config.optim))
            random = torch.Generator().manual_seed(int(seeded_random(config.seed, step, "", "mask").random() * 2**53))
            with precision.autocast():
                loss = model(images, labels, random)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            update_parameters(optimizer, loss.detach(), config.optim.clip_norm)
            if (step + 1) % config.train.log_every == 0 or step + 1 == steps:
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise ConfigError(
                        f"the loss of step {step + 1} is {value}, of {len(images)} usable pictures: lower optim.lr or warm up "
                        "for longer, or repair rows that cannot be decoded or have no label"
                    )
                log(step + 1, {"pretrain/loss": value})
                show("steps", step + 1, steps, f"loss {value:.3f}")


@torch.inference_mode()
def score_objective(config: Experiment, model: Classifier | Inpainter, device: torch.device) -> dict[str, float]:
    """The mean of the model's metrics over `data.val`."""
    reader = val_reader(config.data, build_index(str(config.data.val), config.data.columns))
    random, batches = torch.Generator().manual_seed(0), dict[str, list[Tensor]]()
    model.eval()
    for segments in sequential_blocks(reader.index.rows, config.eval.batch):
        images, labels = load_batch([reader.read(segments)], model, config, device)
        for name, values in model.metrics(images, labels, random).items():
            batches.setdefault(name, []).append(values.cpu())
    return {name: float(torch.cat(values).mean()) for name, values in batches.items()}


def load_batch(
    blocks: list[Block], model: Classifier | Inpainter, config: Experiment, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The usable pictures of some blocks, normalised, float [n, 3, H, W], and their labels, int64 [n]."""
    usable = [block["valid"] & ((block["label"] >= 0) | isinstance(model, Inpainter)) for block in blocks]
    images = torch.cat([torch.tensor(block["image"][rows]) for block, rows in zip(blocks, usable, strict=True)])
    labels = torch.cat([torch.tensor(block["label"][rows]) for block, rows in zip(blocks, usable, strict=True)])
    return normalise(images.to(device), config.data.mean, config.data.std), labels.to(device)


def stream(reader: BlockReader, plan: BlockPlan, steps: int) -> Iterator[Block]:
    """The blocks of the first `steps` steps, in order, from the connected Ray."""
    from nev.data.stream import make_stream

    blocks: Any = make_stream(reader, plan, 0, steps).iter_batches(batch_size=None, batch_format="numpy")
    return iter(blocks)


def read_classes(index: Index) -> int:
    """The number of classes: one more than the highest label. Raises DataError for a set without labels, or with one class."""
    if not index.columns.label:
        raise DataError(f"{index.root}: --objective supervised needs an integer label column (data.columns.label)")
    highest = -1
    for shard in range(len(index.paths)):
        labels = read_shard_labels(index, shard, needed=True)
        highest = max(highest, int(labels.max(initial=-1)))
    if highest < 1:
        raise DataError(f"{index.root}: its labels name fewer than two classes; --objective supervised needs two")
    return highest + 1
