"""InfoNCE or the sigmoid loss at nested widths, over one set of tiles (Matryoshka: Kusupati et al. 2022, arXiv 2205.13147).

The first d_l numbers of an embedding, scaled to unit length again, are an embedding of their own. With a_i = 1/|x_i,:d_l|,
b_j = 1/|t_j,:d_l| and P_ij = sum_{k < d_l} x_ik t_jk, the scores of level l are s_ij = tau a_i b_j P_ij (+ beta), and

    L            = sum_l lambda_l L_l
    dL/dx_ik     = sum_{l: d_l > k} [ sum_j H_ij t_jk - rho_i a_i^2 x_ik ],    H = lambda_l tau a b dL_l/ds
    dL/dlog tau  = sum_l sum_i rho_i,                                          rho_i = lambda_l sum_j dL_l/ds_ij tau a_i b_j P_ij
    dL/dbeta     = sum_l lambda_l sum_ij dL_l/ds_ij

P of a level is P of the next narrower level plus the product of one segment of the numbers. H is summed from the widest level
down, so each segment takes part in one product. The matrix products cost as much as a loss at the widest width alone, whatever
the number of levels.

Collectives are those of `contrastive_loss` and `sigmoid_loss`, with the columns of all levels in one message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nev.losses.contrastive import reduce_column_max
from nev.losses.gather import AsyncGather
from nev.losses.pairwise import LossAndGrads, LossOutput, PrecomputedGradient, gather_texts, local_share, upcast
from nev.losses.sigmoid import SOFTPLUS_THRESHOLD
from nev.losses.tiles import LogSums, RunningArgmax, pairs_in_tile, tile_shape
from nev.ops.onednn import add_product, product

MASKED_SCORE = -1e30  # of an invalid text: its exponential is 0, and 0 times the score is 0 (not NaN, as with -inf)


class Level(NamedTuple):
    """One of the nested widths.

    weight: lambda.
    rows: tau a, [b], the factor of each image's scores; 0 for invalid images.
    columns: b, [N], the factor of each text's scores; 0 for invalid texts.
    """

    width: int
    weight: float
    rows: Tensor
    columns: Tensor


class Tile(NamedTuple):
    """A part of the scores.

    rows, columns: the images and the texts of the tile.
    texts: [c, D], 0 for invalid texts.
    scores: [r, c] for each level, less the level's shift; MASKED_SCORE for invalid texts.
    """

    rows: slice
    columns: slice
    texts: Tensor
    scores: list[Tensor]


def matryoshka_loss(
    image: Tensor,
    text: Tensor | AsyncGather,
    log_scale: Tensor,
    widths: Mapping[int, float],
    bias: Tensor | None = None,
    valid: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> LossOutput:
    """The weighted sum of the losses at `widths`: of `contrastive_loss`, or with a `bias` of `sigmoid_loss`.

    widths: width to weight. The widest must be D.

    The other arguments, the result and the scale of the gradients are those of `contrastive_loss`; `correct` counts at the widest
    width. Raises ValueError as the two losses do, and for widths that do not fit D.
    """
    gathering = gather_texts(image, text, log_scale, valid, group)
    if not widths or max(widths) != image.shape[1] or min(widths) < 1:
        raise ValueError(f"widths must be from 1 to D = {image.shape[1]} and hold it, not {sorted(widths)}")
    inputs = image, gathering.local, log_scale, *(() if bias is None else (bias,))
    need_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)

    def compute() -> LossAndGrads:
        x = upcast(image, gathering)
        _, valid_texts = gathering.wait()
        scale = log_scale.to(x.dtype).exp()
        levels = make_levels(x, gathering, scale, widths)
        trained_texts = len(valid_texts) if gathering.local.requires_grad else 0
        accumulator = GradientAccumulator(x, levels, scale, trained_texts) if need_grad else None
        if bias is None:
            return _infonce(x, gathering, levels, accumulator)
        return _sigmoid(x, gathering, levels, bias.to(x.dtype), accumulator)

    return LossOutput(*PrecomputedGradient.apply(compute, *inputs))


def make_levels(x: Tensor, gathering: AsyncGather, scale: Tensor, widths: Mapping[int, float]) -> list[Level]:
    """The levels, narrowest first. x: [b, D], 0 in invalid rows."""
    texts, valid_texts = gathering.wait()
    return [
        Level(
            width,
            weight,
            scale * _inverse_norms(x[:, :width]),
            torch.where(valid_texts, _inverse_norms(texts[:, :width].to(x.dtype)), 0),
        )
        for width, weight in sorted(widths.items())
    ]


def iterate_tiles(
    x: Tensor, gathering: AsyncGather, levels: Sequence[Level], shifts: Sequence[Tensor]
) -> Iterator[Tile]:
    """The tiles of the scores of x [b, D] with all texts."""
    texts, valid_texts = gathering.wait()
    height, width = tile_shape(x.device)
    starts = [0, *(level.width for level in levels)]
    segments = [slice(*ends) for ends in pairwise(starts)]
    parts = [x[:, segment].contiguous() for segment in segments]
    for start in range(0, len(texts), width):
        columns = slice(start, min(start + width, len(texts)))
        keep = valid_texts[columns]
        # The numbers of an invalid row must not reach a product, not even with weight 0: NaN * 0 is NaN.
        tile_texts = texts[columns].to(x.dtype).masked_fill(~keep[:, None], 0)
        pieces = [tile_texts[:, segment].contiguous() for segment in segments]
        offsets = [torch.where(keep, -shift, MASKED_SCORE) for shift in shifts]
        for first in range(0, len(x), height):
            rows = slice(first, min(first + height, len(x)))
            dots = product(parts[0][rows], pieces[0])
            scores = []
            for number, level in enumerate(levels):
                if number:
                    dots = dots.add_(product(parts[number][rows], pieces[number]))
                score = dots * level.rows[rows, None]
                scores.append(score.mul_(level.columns[columns]).add_(offsets[number]))
            yield Tile(rows, columns, tile_texts, scores)


class GradientAccumulator:
    """Sums the gradients, times N, over the tiles. texts: N where the texts require a gradient, else 0."""

    def __init__(self, x: Tensor, levels: Sequence[Level], scale: Tensor, texts: int) -> None:
        self._x, self._levels, self._scale = x, levels, scale
        self._images = torch.zeros_like(x)
        self._texts = x.new_zeros(texts, x.shape[1])
        self._rho = x.new_zeros(len(levels), len(x))
        self._sigma = x.new_zeros(len(levels), texts)
        self.bias = x.new_zeros(())

    def add(self, tile: Tile, slopes: Sequence[Tensor], shifts: Sequence[Tensor]) -> None:
        """Add the gradients of a tile. Overwrites `slopes` and the tile's scores.

        slopes: lambda dL/ds of each level, [r, c], 0 in invalid rows and columns.
        """
        rows, columns, tile_texts, scores = tile
        summed_weights: Tensor | None = None
        for number in reversed(range(len(self._levels))):
            level, slope = self._levels[number], slopes[number]
            segment = slice(self._levels[number - 1].width if number else 0, level.width)
            self.bias += slope.sum()
            dots = slope * scores[number].add_(shifts[number])
            self._rho[number, rows] += dots.sum(1)
            weights = slope.mul_(level.rows[rows, None]).mul_(level.columns[columns])
            summed_weights = weights if summed_weights is None else summed_weights.add_(weights)
            add_product(self._images[rows, segment], summed_weights, tile_texts[:, segment].T)
            if len(self._texts):
                self._sigma[number, columns] += dots.sum(0)
                add_product(self._texts[columns, segment], summed_weights.T, self._x[rows, segment].T)

    def finish(self, gathering: AsyncGather, mean: Tensor, bias: bool) -> tuple[Tensor | None, ...]:
        """The gradients of image, text, log tau and, with `bias`, of the bias. mean: 1 / N."""
        texts, valid_texts = gathering.wait()
        factor = gathering.world * mean
        self._images.masked_fill_(~gathering.valid[:, None], 0)
        for number, level in enumerate(self._levels):
            self._images[:, : level.width] -= (self._rho[number] * (level.rows / self._scale) ** 2)[:, None] * self._x[
                :, : level.width
            ]
        grad_texts = None
        if len(self._texts):
            local = texts.to(self._x.dtype).masked_fill(~valid_texts[:, None], 0)
            for number, level in enumerate(self._levels):
                share = self._sigma[number] * level.columns**2
                self._texts[:, : level.width] -= share[:, None] * local[:, : level.width]
            grad_texts = local_share(self._texts.mul_(factor), gathering)
        gradients = self._images.mul_(factor), grad_texts, self._rho.sum() * factor
        return (*gradients, self.bias * factor) if bias else gradients


def _infonce(
    x: Tensor, gathering: AsyncGather, levels: Sequence[Level], accumulator: GradientAccumulator | None
) -> LossAndGrads:
    valid, first, world = gathering.valid, gathering.first, gathering.world
    texts, valid_texts = gathering.wait()
    local = slice(first, first + len(x))
    pair_dots = torch.cumsum(x * texts[local].to(x.dtype).masked_fill(~valid[:, None], 0), 1)
    sums = [
        LogSums.start(pair_dots[:, level.width - 1] * level.rows * level.columns[local], len(texts), valid, first)
        for level in levels
    ]
    best = RunningArgmax.start(x)
    for tile in iterate_tiles(x, gathering, levels, [level_sums.shift for level_sums in sums]):
        best.update(tile.rows, tile.columns, tile.scores[-1], first + tile.rows.start - tile.columns.start)
        for level_sums, scores in zip(sums, tile.scores, strict=True):
            level_sums.update(tile.rows, tile.columns, scores)
    exact = [level_sums.exact(valid_texts) for level_sums in sums]
    if not all(exact):
        sums = [level_sums.with_own_shifts() for level_sums in sums]
        for tile in iterate_tiles(x, gathering, levels, [level_sums.shift for level_sums in sums]):
            for level_sums, scores in zip(sums, tile.scores, strict=True):
                level_sums.update(tile.rows, tile.columns, scores)

    shifts = torch.stack([level_sums.shift for level_sums in sums])
    columns = torch.stack([level_sums.column for level_sums in sums])
    column_max = reduce_column_max(columns, shifts[:, None], valid_texts, gathering)
    rows, pairs = (torch.stack([getattr(level_sums, name) for level_sums in sums]) for name in ("row", "pair"))
    terms = torch.where(valid, rows - pairs + column_max[:, local] - pairs, 0)
    counts = torch.stack([_weighted(terms, levels), best.correct(first, valid).to(x.dtype)])
    totals = torch.cat([(columns - column_max).exp_().flatten(), counts])
    if world > 1:
        dist.all_reduce(totals, dist.ReduceOp.SUM, gathering.group)
    log_sums = torch.where(valid_texts, totals[:-2].view(len(levels), -1), 1).log()
    count = valid_texts.sum()
    mean = 1 / count.clamp(min=1).to(x.dtype)
    loss = (totals[-2] + _weighted(log_sums, levels)) * mean * 0.5
    own_terms = 0.5 * _weighted_rows(terms + log_sums[:, local], levels)
    correct = totals[-1].round().long()
    if accumulator is None:
        return LossAndGrads(loss, correct, count, own_terms, (None, None, None))
    columns = column_max + log_sums
    for tile in iterate_tiles(x, gathering, levels, list(shifts)):
        slopes = []
        for number, (level, score) in enumerate(zip(levels, tile.scores, strict=True)):
            slope = (score - rows[number, tile.rows, None]).exp_().add_((score - columns[number, tile.columns]).exp_())
            pairs_in_tile(slope, first + tile.rows.start - tile.columns.start).sub_(2)
            slopes.append(slope.mul_(0.5 * level.weight).masked_fill_(~valid[tile.rows, None], 0))
        accumulator.add(tile, slopes, list(shifts))
    return LossAndGrads(loss, correct, count, own_terms, accumulator.finish(gathering, mean, bias=False))


def _sigmoid(
    x: Tensor, gathering: AsyncGather, levels: Sequence[Level], bias: Tensor, accumulator: GradientAccumulator | None
) -> LossAndGrads:
    valid, first = gathering.valid, gathering.first
    _, valid_texts = gathering.wait()
    best, terms = RunningArgmax.start(x), x.new_zeros(len(x))
    shifts = [-bias] * len(levels)
    for tile in iterate_tiles(x, gathering, levels, shifts):
        offset = first + tile.rows.start - tile.columns.start
        best.update(tile.rows, tile.columns, tile.scores[-1], offset)
        slopes = []
        for level, score in zip(levels, tile.scores, strict=True):
            part = F.softplus(score, threshold=SOFTPLUS_THRESHOLD)
            pairs_in_tile(part, offset).copy_(F.softplus(-pairs_in_tile(score, offset), threshold=SOFTPLUS_THRESHOLD))
            terms[tile.rows] += level.weight * torch.where(valid[tile.rows], part.sum(1), 0)
            slope = score.sigmoid()
            pairs_in_tile(slope, offset).sub_(1)
            slopes.append(slope.mul_(level.weight).masked_fill_(~valid[tile.rows, None], 0))
        if accumulator is not None:
            accumulator.add(tile, slopes, shifts)
    totals = torch.stack([terms.sum(), best.correct(first, valid).to(x.dtype)])
    if gathering.world > 1:
        dist.all_reduce(totals, dist.ReduceOp.SUM, gathering.group)
    count = valid_texts.sum()
    mean = 1 / count.clamp(min=1).to(x.dtype)
    gradients = (None,) * 4 if accumulator is None else accumulator.finish(gathering, mean, bias=True)
    return LossAndGrads(totals[0] * mean, totals[1].round().long(), count, terms, gradients)


def _weighted(terms: Tensor, levels: Sequence[Level]) -> Tensor:
    """The sum of `terms` [L, n], each level times its weight. (A tensor of weights would be copied to the device each step.)"""
    parts = [level.weight * part.sum() for level, part in zip(levels, terms, strict=True)]
    return torch.stack(parts).sum()


def _weighted_rows(terms: Tensor, levels: Sequence[Level]) -> Tensor:
    """The weighted sum over the levels of `terms` [L, b]: [b]."""
    parts = [level.weight * part for level, part in zip(levels, terms, strict=True)]
    return torch.stack(parts).sum(0)


def _inverse_norms(rows: Tensor) -> Tensor:
    """1 / |row|, [n]; 0 for a row of zeros."""
    norms = rows.norm(dim=1)
    return torch.where(norms > 0, 1 / norms, 0)
