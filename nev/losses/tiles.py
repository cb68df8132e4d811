"""The scores of all pairs, a tile at a time, so that the b x N matrix of scores is never in memory.

There are two passes over the tiles: `statistics` computes the log-sum-exps of rows and columns, and `gradient` computes the
weights that follow from these, times the texts. Each pass computes the scores again: three matrix products, where a stored matrix
of scores would need two.

The exponentials of a tile are computed once, less one shift for the whole matrix, and are summed by row and by column. This is
exact while every log-sum-exp lies in a window around the shift: numbers that underflow are less than e^-32 of their sum, and
nothing overflows. Scores of unit vectors at a scale of 100 lie within 200 of each other, and their log-sum-exps much closer, so
the window nearly always holds. Where it does not hold, a further pass has a shift for each row and column and takes twice the
exponentials. On a GPU that pass comes first, because a check of the window would make the host wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from nev.ops.onednn import product

TILE_ROWS, TILE_COLUMNS = 1024, 512  # 2 MiB in fp32: a tile stays in a core's cache between its product and its sums
GPU_TILE_ROWS, GPU_TILE_COLUMNS = (
    8192,
    4096,
)  # 128 MiB: on a GPU a tile costs a dozen kernel launches, whatever its size
WINDOW_LOW, WINDOW_HIGH = -55.0, 75.0  # e^-87 is the smallest normal float32, and e^88 is nearly the largest float32
PAIR_MARGIN = 40.0  # distance of the shift below the highest score of a pair


class Statistics(NamedTuple):
    """Statistics of the scores of b images with N texts. Invalid images and texts are left out; their rows hold any numbers.

    row: [b], log-sum-exp over all texts, less `shift`.
    column: [N], log-sum-exp over these images, less `shift`; -inf where no image is valid.
    pair: [b], score of each image with its own text, less `shift`.
    best: the text with the highest score, for each image.
    shift: 0-d. It stays apart, because adding it would lose digits.
    """

    row: Tensor
    column: Tensor
    pair: Tensor
    best: RunningArgmax
    shift: Tensor


@dataclass
class RunningArgmax:
    """The text with the highest score for each of b images, over the tiles so far. Of equal scores the first text counts.

    score: [b], the highest score. text: int64 [b], number of the text.
    """

    score: Tensor
    text: Tensor

    @classmethod
    def start(cls, x: Tensor) -> Self:
        """The state before the first tile. x: [b, D]."""
        return cls(x.new_full((len(x),), -torch.inf), torch.zeros(len(x), dtype=torch.int64, device=x.device))

    def update(self, rows: slice, columns: slice, scores: Tensor) -> None:
        """Add a tile of scores. Tiles must come in the order of their columns."""
        best_score, best_column = scores.max(1)
        self.text[rows] = torch.where(best_score > self.score[rows], best_column + columns.start, self.text[rows])
        torch.maximum(self.score[rows], best_score, out=self.score[rows])

    def correct(self, first: int, valid: Tensor) -> Tensor:
        """Number of valid images whose own text is the best, int64, 0-d. The text of image i is number first + i."""
        own = torch.arange(first, first + len(valid), device=valid.device)
        return ((self.text == own) & valid).sum()


class Tile(NamedTuple):
    """A part of the scores.

    rows, columns: the images and the texts of the tile.
    across: the texts, transposed, [D, c].
    scores: [r, c], less the shift; -inf for invalid texts.
    """

    rows: slice
    columns: slice
    across: Tensor
    scores: Tensor


def tile_shape(device: torch.device) -> tuple[int, int]:
    """(rows, columns) of a tile."""
    return (TILE_ROWS, TILE_COLUMNS) if device.type == "cpu" else (GPU_TILE_ROWS, GPU_TILE_COLUMNS)


def iterate_tiles(x: Tensor, texts: Tensor, valid_texts: Tensor, shift: Tensor) -> Iterator[Tile]:
    """The tiles of x [b, D] times texts [N, D]. The texts are converted to x's dtype a tile at a time."""
    height, width = tile_shape(x.device)
    for start in range(0, len(texts), width):
        columns = slice(start, min(start + width, len(texts)))
        keep = valid_texts[columns]
        # The numbers of an invalid row must not reach a product, not even with weight 0: NaN * 0 is NaN.
        tile_texts = texts[columns].to(x.dtype).masked_fill(~keep[:, None], 0)
        across = tile_texts.T.contiguous()
        bias = torch.where(keep, -shift, -torch.inf)
        for first in range(0, len(x), height):
            rows = slice(first, min(first + height, len(x)))
            yield Tile(rows, columns, across, product(x[rows], tile_texts, bias))


def statistics(x: Tensor, texts: Tensor, valid: Tensor, valid_texts: Tensor, first: int) -> Statistics:
    """Statistics of the scores of images with texts.

    x: [b, D], images times the scale, 0 in invalid rows.
    texts: [N, D]. The text of image i is number first + i.
    valid: bool [b]. valid_texts: bool [N].
    """
    pairs = (x * texts[first : first + len(x)].to(x.dtype)).sum(1)
    sums = LogSums.start(pairs, len(texts), valid, first)
    best = RunningArgmax.start(x)
    for rows, columns, _, scores in iterate_tiles(x, texts, valid_texts, sums.shift):
        best.update(rows, columns, scores)
        sums.update(rows, columns, scores)
    if not sums.exact(valid_texts):
        sums = sums.with_own_shifts()
        for rows, columns, _, scores in iterate_tiles(x, texts, valid_texts, sums.shift):
            sums.update(rows, columns, scores)
    return Statistics(sums.row, sums.column, sums.pair, best, sums.shift)


@dataclass
class LogSums:
    """Log-sum-exps of rows [b] and columns [N], and the scores of the pairs [b], over the tiles so far.

    With `one_shift`, `row` and `column` hold sums of exponentials, less one shift (0-d) for all scores, until `exact` takes their
    logarithms. Without (`with_own_shifts`), they hold log-sum-exps, and each row and column has a shift of its own.
    """

    shift: Tensor
    pair: Tensor
    row: Tensor
    column: Tensor
    valid: Tensor
    first: int
    one_shift: bool = True

    @classmethod
    def start(cls, pairs: Tensor, texts: int, valid: Tensor, first: int) -> Self:
        """The state before the first tile. pairs: [b], approximate scores of the pairs, from which the shift on a CPU follows."""
        shift = torch.where(valid, pairs, -torch.inf).amax() - PAIR_MARGIN
        shift = torch.where(shift.isfinite(), shift, 0)
        sums = cls(shift, torch.zeros_like(pairs), torch.zeros_like(pairs), pairs.new_zeros(texts), valid, first)
        return sums if pairs.device.type == "cpu" else sums.with_own_shifts()

    def with_own_shifts(self) -> Self:
        """The state before the first tile, for scores of any range."""
        row, column = (torch.full_like(sums, -torch.inf) for sums in (self.row, self.column))
        pair = torch.zeros_like(self.pair)
        return replace(self, shift=torch.zeros_like(self.shift), pair=pair, row=row, column=column, one_shift=False)

    def update(self, rows: slice, columns: slice, scores: Tensor) -> None:
        """Add a tile of scores, less the shift. Overwrites the scores."""
        offset = self.first + rows.start - columns.start
        pairs = pairs_in_tile(scores, offset)
        start = rows.start + max(0, -offset)
        self.pair[start : start + len(pairs)] = pairs
        if self.one_shift:
            exponentials = scores.exp_()
            self.row[rows] += exponentials.sum(1)
            self.column[columns] += self.valid[rows].to(scores.dtype) @ exponentials
        else:
            self.row[rows] = torch.logaddexp(self.row[rows], scores.logsumexp(1))
            scores.masked_fill_(~self.valid[rows, None], -torch.inf)
            self.column[columns] = torch.logaddexp(self.column[columns], scores.logsumexp(0))

    def exact(self, valid_texts: Tensor) -> bool:
        """Take the logarithms of the sums, and return whether one shift was enough. Call this once, after the last tile."""
        if not self.one_shift:
            return True
        self.row.log_(), self.column.log_()
        return is_in_window(self.row, self.valid) and is_in_window(self.column, valid_texts)


def gradient(
    x: Tensor, texts: Tensor, valid: Tensor, valid_texts: Tensor, first: int, stats: Statistics, need_text_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of images and texts, but for their factors. g_ij = e^(s_ij - row_i) + e^(s_ij - column_j), less 2 for pairs.

    stats: of `statistics`, with the log-sum-exp over the images of all ranks as `column`.
    The other arguments are those of `statistics`.

    Returns sum_j g_ij t_j, [b, D], 0 in invalid rows, and with `need_text_grad` sum_i g_ij x_i over these images, [N, D], 0 for
    invalid texts.
    """
    row, column = stats.row, stats.column
    one_shift = is_in_window(row, valid) and is_in_window(column, valid_texts)
    by_row, by_column = (-row).exp(), (-column).exp()
    total = torch.zeros_like(x)
    total_texts = x.new_zeros(texts.shape) if need_text_grad else None
    for rows, columns, across, scores in iterate_tiles(x, texts, valid_texts, stats.shift):
        if one_shift:
            weights = scores.exp_().mul_(by_row[rows, None] + by_column[columns])
        else:
            weights = (scores - row[rows, None]).exp_() + scores.sub_(column[columns]).exp_()
        # Subtracted before the product: the weight of a clear pair is nearly 2, and after the product digits would be lost.
        pairs_in_tile(weights, first + rows.start - columns.start).sub_(2)
        total[rows] += product(weights, across)
        if total_texts is not None:
            weights.masked_fill_(~valid[rows, None], 0)  # invalid rows hold any numbers, inf too
            total_texts[columns] += product(weights.T.contiguous(), x[rows].T.contiguous())
    if total_texts is not None:
        total_texts.masked_fill_(~valid_texts[:, None], 0)
    return total.masked_fill_(~valid[:, None], 0), total_texts


def is_in_window(shifted: Tensor, counts: Tensor) -> bool:
    """Whether all valid log-sum-exps lie where one shift is exact. False on a GPU, for which the host would have to wait."""
    return shifted.device.type == "cpu" and bool((((shifted > WINDOW_LOW) & (shifted < WINDOW_HIGH)) | ~counts).all())


def pairs_in_tile(tile: Tensor, offset: int) -> Tensor:
    """A view of the scores of pairs in a tile: the tile's diagonal number `offset`, which may be empty."""
    height, width = tile.shape
    return tile.diagonal(offset) if -height < offset < width else tile[0, :0]
