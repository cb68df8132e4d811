"""The scores of all pairs a tile at a time, so that the b x N matrix of them is never there.

Two walks over the tiles: `statistics` for the log-sum-exps of rows and columns, `gradient` for the weights that follow from
them, times the texts. Each computes the scores anew: three matrix products in all, where keeping them would take two.

A tile's exponentials are taken once, around one shift for the whole matrix, and serve its rows and its columns alike. That is
exact while every log-sum-exp lies in a window around the shift: what underflows is less than e^-32 of its sum, and nothing
overflows. Scores of unit vectors at a scale of 100 lie within 200 of each other and their sums far closer, so it nearly always
does. Where it does not, another walk is made with a shift for each row and column, at twice the exponentials; a GPU takes that
way at once, since the host would have to wait for an answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from nev.ops.onednn import product

TILE_ROWS, TILE_COLUMNS = 1024, 512  # 2 MiB in fp32: a tile stays in a core's cache between its product and its sums
GPU_TILE_ROWS, GPU_TILE_COLUMNS = 8192, 4096  # 128 MiB: there a tile costs a dozen launches, whatever its size
LOW, HIGH = -55.0, 75.0  # the window: e^-87 is the least normal float32, and e^88 nearly the greatest
ABOVE = 40.0  # how far the scores of the pairs themselves may lie above the shift


class Statistics(NamedTuple):
    """Of the scores of b images with N texts, all less `shift` (0-d), which would cost digits; invalid ones are left out.

    row: [b], log-sum-exp over all texts. column: [N], log-sum-exp over these images, -inf where there is none. own: [b], the
    score of each pair. best: of the texts, for each image.
    In invalid rows anything may stand.
    """

    row: Tensor
    column: Tensor
    own: Tensor
    best: RunningArgmax
    shift: Tensor


@dataclass
class RunningArgmax:
    """The text with the highest score for each of b images, the first of equal ones, as tile after tile is seen."""

    score: Tensor
    text: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Self:
        """Before any tile is seen. x: [b, D]."""
        return cls(x.new_full((len(x),), -torch.inf), torch.zeros(len(x), dtype=torch.int64, device=x.device))

    def update(self, rows: slice, columns: slice, scores: Tensor) -> None:
        """Take a tile of scores into account, the one with the first columns first."""
        top, at = scores.max(1)
        self.text[rows] = torch.where(top > self.score[rows], at + columns.start, self.text[rows])
        torch.maximum(self.score[rows], top, out=self.score[rows])

    def correct(self, first: int, valid: Tensor) -> Tensor:
        """How many valid images have their own text for the best; that of image i is number first + i. int64, 0-d."""
        own = torch.arange(first, first + len(valid), device=valid.device)
        return ((self.text == own) & valid).sum()


class Tile(NamedTuple):
    """Scores [r, c] less the shift, -inf for invalid texts; across: the texts, [D, c]."""

    rows: slice
    columns: slice
    across: Tensor
    scores: Tensor


def tile_shape(device: torch.device) -> tuple[int, int]:
    """(rows, columns) of a tile."""
    return (TILE_ROWS, TILE_COLUMNS) if device.type == "cpu" else (GPU_TILE_ROWS, GPU_TILE_COLUMNS)


def walk(x: Tensor, texts: Tensor, valid_texts: Tensor, shift: Tensor) -> Iterator[Tile]:
    """The tiles of x [b, D] times texts [N, D], the latter converted to x's dtype a tile at a time."""
    height, width = tile_shape(x.device)
    for start in range(0, len(texts), width):
        columns = slice(start, min(start + width, len(texts)))
        keep = valid_texts[columns]
        # What an invalid row holds must not reach a product, not even with weight 0: NaN * 0 is NaN.
        some = texts[columns].to(x.dtype).masked_fill(~keep[:, None], 0)
        across = some.T.contiguous()
        bias = torch.where(keep, -shift, -torch.inf)
        for first in range(0, len(x), height):
            rows = slice(first, min(first + height, len(x)))
            yield Tile(rows, columns, across, product(x[rows], some, bias))


def statistics(x: Tensor, texts: Tensor, valid: Tensor, valid_texts: Tensor, first: int) -> Statistics:
    """Statistics of the scores of x [b, D], already times the scale and 0 in invalid rows, with texts [N, D].

    The text of image i is number first + i.
    """
    pairs = (x * texts[first : first + len(x)].to(x.dtype)).sum(1)
    sums = LogSums.of(pairs, len(texts), valid, first)
    best = RunningArgmax.of(x)
    for rows, columns, _, scores in walk(x, texts, valid_texts, sums.shift):
        best.update(rows, columns, scores)
        sums.update(rows, columns, scores)
    if not sums.exact(valid_texts):
        sums = sums.with_own_shifts()
        for rows, columns, _, scores in walk(x, texts, valid_texts, sums.shift):
            sums.update(rows, columns, scores)
    return Statistics(sums.row, sums.column, sums.own, best, sums.shift)


@dataclass
class LogSums:
    """Log-sum-exps of rows [b] and columns [N], and the scores of the pairs [b], as tile after tile is seen.

    Exponentials are taken around one shift for all scores (0-d), or (`with_own_shifts`) around one for each row and column.
    """

    shift: Tensor
    own: Tensor
    row: Tensor
    column: Tensor
    valid: Tensor
    first: int
    one_shift: bool = True

    @classmethod
    def of(cls, pairs: Tensor, texts: int, valid: Tensor, first: int) -> Self:
        """Before any tile is seen. pairs: [b], the scores of the pairs, roughly, of which a CPU's shift is made."""
        shift = torch.where(valid, pairs, -torch.inf).amax() - ABOVE
        shift = torch.where(shift.isfinite(), shift, 0)
        made = cls(shift, torch.zeros_like(pairs), torch.zeros_like(pairs), pairs.new_zeros(texts), valid, first)
        return made if pairs.device.type == "cpu" else made.with_own_shifts()

    def with_own_shifts(self) -> Self:
        """The same before any tile is seen, for scores of any spread."""
        row, column = (torch.full_like(one, -torch.inf) for one in (self.row, self.column))
        own = torch.zeros_like(self.own)
        return replace(self, shift=torch.zeros_like(self.shift), own=own, row=row, column=column, one_shift=False)

    def update(self, rows: slice, columns: slice, scores: Tensor) -> None:
        """Take a tile of scores, less the shift, into account; nothing of it is left."""
        offset = self.first + rows.start - columns.start
        pairs = pairs_in_tile(scores, offset)
        start = rows.start + max(0, -offset)
        self.own[start : start + len(pairs)] = pairs
        if self.one_shift:
            exponentials = scores.exp_()
            self.row[rows] += exponentials.sum(1)
            self.column[columns] += self.valid[rows].to(scores.dtype) @ exponentials
        else:
            self.row[rows] = torch.logaddexp(self.row[rows], scores.logsumexp(1))
            scores.masked_fill_(~self.valid[rows, None], -torch.inf)
            self.column[columns] = torch.logaddexp(self.column[columns], scores.logsumexp(0))

    def exact(self, valid_texts: Tensor) -> bool:
        """Take the logarithms of what was summed around one shift; return whether it was enough for them."""
        if not self.one_shift:
            return True
        self.row.log_(), self.column.log_()
        return is_in_window(self.row, self.valid) and is_in_window(self.column, valid_texts)


def gradient(
    x: Tensor, texts: Tensor, valid: Tensor, valid_texts: Tensor, first: int, found: Statistics, of_texts: bool
) -> tuple[Tensor, Tensor | None]:
    """With g_ij = e^(s_ij - row_i) + e^(s_ij - column_j), less 2 where i and j are a pair:

    sum_j g_ij t_j, [b, D], 0 in invalid rows; and, where asked for, sum_i g_ij x_i over these images, [N, D], 0 for
    invalid texts.
    found: of `statistics`, but `column` the log-sum-exp over all ranks' images. The others as there.
    """
    row, column = found.row, found.column
    narrow = is_in_window(row, valid) and is_in_window(column, valid_texts)
    by_row, by_column = (-row).exp(), (-column).exp()
    total = torch.zeros_like(x)
    total_texts = x.new_zeros(texts.shape) if of_texts else None
    for rows, columns, across, scores in walk(x, texts, valid_texts, found.shift):
        if narrow:
            weights = scores.exp_().mul_(by_row[rows, None] + by_column[columns])
        else:
            weights = (scores - row[rows, None]).exp_() + scores.sub_(column[columns]).exp_()
        # Before the product: where a pair stands out, its weight is nearly 2, and the difference would lose its digits after.
        pairs_in_tile(weights, first + rows.start - columns.start).sub_(2)
        total[rows] += product(weights, across)
        if total_texts is not None:
            weights.masked_fill_(~valid[rows, None], 0)  # there anything may stand, inf too
            total_texts[columns] += product(weights.T.contiguous(), x[rows].T.contiguous())
    if total_texts is not None:
        total_texts.masked_fill_(~valid_texts[:, None], 0)
    return total.masked_fill_(~valid[:, None], 0), total_texts


def is_in_window(shifted: Tensor, counts: Tensor) -> bool:
    """Whether the log-sum-exps that count lie where one shift is exact. A GPU is not asked: the host would wait for it."""
    return shifted.device.type == "cpu" and bool((((shifted > LOW) & (shifted < HIGH)) | ~counts).all())


def pairs_in_tile(tile: Tensor, offset: int) -> Tensor:
    """A view of the entries of a tile that are scores of pairs, which lie on its diagonal `offset`; it may be empty."""
    height, width = tile.shape
    return tile.diagonal(offset) if -height < offset < width else tile[0, :0]
