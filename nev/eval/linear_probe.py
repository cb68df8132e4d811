"""A linear head from the features of a locked trunk to text vectors, trained in memory by the contrastive loss, in seconds."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nev.eval.metrics.ranks import Floats, Ints
from nev.eval.metrics.retrieval import retrieval_ranks
from nev.losses.contrastive import contrastive_loss
from nev.models.frozen import FeatureHead
from nev.models.heads import make_linear
from nev.ops.threads import torch_threads

LEARNING_RATES = (5e-3, 2e-2)
STEPS, WARMUP, LOOK_EVERY = 100, 10, 20
BATCH = 512
WEIGHT_DECAY = 0.1
INIT_SCALE, MAX_SCALE = 20.0, 100.0
VALIDATION_SHARE = 0.1  # share of the fitting rows that choose the learning rate and the step, and are not trained on
CHUNK = 4096


class LinearProbe(NamedTuple):
    """A trained head, and how it was chosen.

    head: standardises features, [n, F], and maps these to unit vectors, [n, D].
    learning_rate, steps: the best on the validation rows.
    validation_score: mean reciprocal rank of the validation rows, the mean of both ways.
    """

    head: FeatureHead
    learning_rate: float
    steps: int
    validation_score: float


class FittingRows(NamedTuple):
    """Rows as tensors. features: float32 [n, F]. texts: float32 [m, D]. first, counts: int64 [n], captions of each row."""

    features: Tensor
    texts: Tensor
    first: Tensor
    counts: Tensor

    def pairs(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Features [b, F] of some rows, and the vector of one caption of each, drawn at random, [b, D]."""
        drawn = (torch.rand(len(rows), generator=generator) * self.counts[rows]).long()
        return self.features[rows], self.texts[self.first[rows] + drawn]


def fit_linear_probe(features: NDArray[np.floating], texts: Floats, owner: Ints, seed: int = 0) -> LinearProbe:
    """Train a linear head: InfoNCE with a learnt temperature, AdamW, a cosine schedule, one caption a picture and step.

    features: float16 or float32 [n, F]. texts: unit, float32 [m, D]. owner: int64 [m], ascending, the row that text j describes;
    every row has a text.
    Of `LEARNING_RATES` and every 20th step the best on a tenth of the rows, which is not fitted, is chosen. The result depends on
    the arguments and the seed alone: one thread computes. Raises ValueError for fewer than 20 rows.
    """
    count = len(features)
    if count < 20:
        raise ValueError(f"a linear probe needs at least 20 pictures with captions, not {count}")
    counts = np.bincount(owner, minlength=count)
    data = FittingRows(
        torch.from_numpy(np.asarray(features, np.float32)),
        torch.from_numpy(np.asarray(texts, np.float32)),
        torch.from_numpy(np.cumsum(counts) - counts),
        torch.from_numpy(counts),
    )
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    validation, fitted = (
        order[: round(VALIDATION_SHARE * count)].sort().values,
        order[round(VALIDATION_SHARE * count) :],
    )
    # Small products gain little from more threads, and lose much where other programs use the cores.
    with torch_threads(1):
        return max(
            (_train(data, fitted, validation, rate, seed) for rate in LEARNING_RATES),
            key=lambda probe: probe.validation_score,
        )


def project(head: FeatureHead, features: NDArray[np.floating]) -> Floats:
    """Features [n, F] to unit vectors, float32 [n, D]."""
    rows = torch.from_numpy(np.asarray(features, np.float32))
    with torch.inference_mode():
        return np.asarray(torch.cat([head(rows[at : at + CHUNK]) for at in range(0, len(rows), CHUNK)]).numpy())


def _train(data: FittingRows, fitted: Tensor, validation: Tensor, rate: float, seed: int) -> LinearProbe:
    """Train with one learning rate on the rows `fitted`; keep the head of the step that is best on the rows `validation`."""
    generator = torch.Generator().manual_seed(seed)
    head = _make_head(data.features[fitted], data.texts.shape[1], seed)
    linear = head.head
    log_scale = nn.Parameter(torch.tensor(math.log(INIT_SCALE)))
    groups = [
        {"params": [linear.weight], "weight_decay": WEIGHT_DECAY},
        {"params": [linear.bias, log_scale], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule)
    best = LinearProbe(copy.deepcopy(head), rate, 0, -math.inf)
    for step in range(1, STEPS + 1):
        rows = fitted[torch.randperm(len(fitted), generator=generator)[:BATCH]]
        some, texts = data.pairs(rows, generator)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(contrastive_loss(head(some), texts, log_scale).loss)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            log_scale.clamp_(max=math.log(MAX_SCALE))
        if step % LOOK_EVERY == 0:
            score = _score(head, data, validation)
            if score > best.validation_score:
                best = LinearProbe(copy.deepcopy(head), rate, step, score)
    return best


def _make_head(features: Tensor, width: int, seed: int) -> FeatureHead:
    """A head with random weights of this seed, which standardises by the mean and deviation of these rows."""
    statistics = torch.stack([features.mean(0), features.std(0, correction=0)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linear = make_linear(features.shape[1], width, bias=True)
    return FeatureHead(nn.Identity(), linear, statistics, width)


def _schedule(step: int) -> float:
    """The share of the learning rate at a step: linear up, then down to 0 by cosine."""
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def _score(head: FeatureHead, data: FittingRows, rows: Tensor) -> float:
    """Mean reciprocal rank of rows among these rows, the mean of both ways: finer than recall, so that few rows can choose."""
    counts = data.counts[rows]
    owner = torch.repeat_interleave(torch.arange(len(rows)), counts)
    within = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    texts = data.texts[data.first[rows][owner] + within].numpy()
    ranks = retrieval_ranks(project(head, data.features[rows].numpy()), texts, owner.numpy())
    return float(np.mean(1 / (1 + ranks.texts)) + np.mean(1 / (1 + ranks.images))) / 2
