"""The scores of all pairs, a tile at a time, so that the b x N matrix of scores is never in memory.

There are two passes over the tiles: `statistics` computes the log-sum-exps of rows and columns, and `gradient` computes the
weights that follow from these, times the texts. Each pass computes the scores again: three matrix products, where a stored matrix
of scores would need two. The exponentials of the first few tiles are stored, so a small batch needs two.

The exponentials of a tile are computed once, less one shift for the whole matrix (none where the scores of pairs are below 40,
as at most scales), and are summed by row and by column. This is exact while every log-sum-exp lies in a window around the shift:
numbers that underflow are less than e^-32 of their sum, and nothing overflows. Scores of unit vectors at a scale of 100 lie
within 200 of each other, and their log-sum-exps much closer, so the window nearly always holds. Where it does not hold, a further
pass has a shift for each row and column and takes twice the exponentials. On a GPU that pass comes first, because a check of the
window would make the host wait for the GPU.

After a product on a CPU, an operation on a small tensor takes some 20 us, a hundredth of a tile's product: there are few of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from nev.losses.pairwise import all_valid
from nev.ops.onednn import add_product, product, transposed

TILE_ROWS, TILE_COLUMNS = 1024, 512  # 2 MiB in fp32: a tile stays in a core's cache between its product and its sums
GPU_TILE_ROWS, GPU_TILE_COLUMNS = (
    8192,
    4096,
)  # 128 MiB: on a GPU a tile costs a dozen kernel launches, whatever its size
CACHED_TILES = 32  # 64 MiB of exponentials in fp32: all of them up to N = 4,096
WINDOW_LOW, WINDOW_HIGH = -55.0, 75.0  # e^-87 is the smallest normal float32, and e^88 is nearly the largest float32
PAIR_MARGIN = 40.0  # distance of the shift below the highest score of a pair


class Statistics(NamedTuple):
    """Statistics of the scores of b images with N texts. Invalid images and texts are left out; their rows hold any numbers.

    row: [b], log-sum-exp over all texts, less `shift`.
    column: [N], log-sum-exp over these images, less `shift`; -inf where no image is valid.
    pair: [b], score of each image with its own text, less `shift`.
    best: the text with the highest score, for each image.
    shift: 0-d. It stays apart, because adding it would lose digits.
    exponentials: of the scores less `shift`, [r, c] of each of the first tiles. `gradient` takes them out.
    """

    row: Tensor
    column: Tensor
    pair: Tensor
    best: RunningArgmax
    shift: Tensor
    exponentials: deque[Tensor]


@dataclass
class RunningArgmax:
    """The highest score for each of b images, over the tiles so far, and the best text up to the tile of the image's own.

    Of equal scores the first text counts.

    score: [b], the highest score.
    text: int64 [b], number of the best text up to that tile; -1 before it, and where a text of an earlier tile is better.
    text_score: [b], its score, which is less than `score` where a later text is better.
    """

    score: Tensor
    text: Tensor
    text_score: Tensor

    @classmethod
    def start(cls, x: Tensor) -> Self:
        """The state before the first tile. x: [b, D]."""
        score = x.new_full((len(x),), -torch.inf)
        return cls(score, torch.full_like(score, -1, dtype=torch.int64), score.clone())

    def update(self, rows: slice, columns: slice, scores: Tensor, offset: int) -> None:
        """Add a tile of scores, whose pairs are its diagonal number `offset`. Tiles must come in the order of their columns."""
        score = self.score[rows]
        # Which text is the best takes a CPU seven times as long as its score, and is needed only where it may be the own.
        if own := rows_of_pairs(scores, offset):
            part = slice(own.start, own.stop)
            highest, column = scores[part].max(1)
            self.text[rows][part] = torch.where(highest > score[part], column + columns.start, -1)
            self.text_score[rows][part] = highest
        torch.maximum(score, scores.amax(1), out=score)

    def correct(self, first: int, valid: Tensor) -> Tensor:
        """Number of valid images whose own text is the best, int64, 0-d. The text of image i is number first + i."""
        own = torch.arange(first, first + len(valid), device=valid.device)
        return ((self.text == own) & (self.text_score == self.score) & valid).sum()


class Tile(NamedTuple):
    """A part of the scores.

    rows, columns: the images and the texts of the tile.
    images: [r, D].
    texts: [c, D], 0 for invalid texts. across: the same, transposed.
    bias: [c], less the shift, -inf for invalid texts; None where that is 0 for all.
    """

    rows: slice
    columns: slice
    images: Tensor
    texts: Tensor
    across: Tensor
    bias: Tensor | None

    def scores(self) -> Tensor:
        """[r, c], less the shift; -inf for invalid texts."""
        return product(self.images, self.texts, self.bias)


def tile_shape(device: torch.device) -> tuple[int, int]:
    """(rows, columns) of a tile."""
    return (TILE_ROWS, TILE_COLUMNS) if device.type == "cpu" else (GPU_TILE_ROWS, GPU_TILE_COLUMNS)


def iterate_tiles(x: Tensor, texts: Tensor, valid_texts: Tensor, shift: Tensor) -> Iterator[Tile]:
    """The tiles of x [b, D] times texts [N, D]. The texts are converted to x's dtype a tile at a time."""
    height, width = tile_shape(x.device)
    plain = all_valid(valid_texts) and not shift  # nothing to mask and nothing to subtract
    for start in range(0, len(texts), width):
        columns = slice(start, min(start + width, len(texts)))
        tile_texts, bias = texts[columns].to(x.dtype), None
        if not plain:
            keep = valid_texts[columns]
            # The numbers of an invalid row must not reach a product, not even with weight 0: NaN * 0 is NaN.
            tile_texts = tile_texts.masked_fill(~keep[:, None], 0)
            bias = torch.where(keep, -shift, -torch.inf)
        across = transposed(tile_texts)
        for first in range(0, len(x), height):
            rows = slice(first, min(first + height, len(x)))
            yield Tile(rows, columns, x[rows], tile_texts, across, bias)


def statistics(x: Tensor, texts: Tensor, valid: Tensor, valid_texts: Tensor, first: int) -> Statistics:
    """Statistics of the scores of images with texts.

    x: [b, D], images times the scale, 0 in invalid rows.
    texts: [N, D]. The text of image i is number first + i.
    valid: bool [b]. valid_texts: bool [N].
    """
    pairs = (x * texts[first : first + len(x)].to(x.dtype)).sum(1)
    sums = LogSums.start(pairs, len(texts), valid, first)
    best = RunningArgmax.start(x)
    exponentials: deque[Tensor] = deque()
    for tile in iterate_tiles(x, texts, valid_texts, sums.shift):
        scores = tile.scores()
        best.update(tile.rows, tile.columns, scores, first + tile.rows.start - tile.columns.start)
        sums.update(tile.rows, tile.columns, scores)
        if sums.one_shift and len(exponentials) < CACHED_TILES:
            exponentials.append(scores)
    if not sums.exact(valid_texts):
        exponentials.clear()
        sums = sums.with_own_shifts()
        for tile in iterate_tiles(x, texts, valid_texts, sums.shift):
            sums.update(tile.rows, tile.columns, tile.scores())
    return Statistics(sums.row, sums.column, sums.pair, best, sums.shift, exponentials)


@dataclass
class LogSums:
    """Log-sum-exps of rows [b] and columns [N], and the scores of the pairs [b], over the tiles so far.

    With `one_shift`, `row` and `column` hold sums of exponentials, less one shift (0-d) for all scores, until `exact` takes their
    logarithms. Without (`with_own_shifts`), they hold log-sum-exps, and each row and column has a shift of its own.

    weight: [b], 1 for valid images and 0 for others.
    """

    shift: Tensor
    pair: Tensor
    row: Tensor
    column: Tensor
    valid: Tensor
    weight: Tensor
    first: int
    one_shift: bool = True

    @classmethod
    def start(cls, pairs: Tensor, texts: int, valid: Tensor, first: int) -> Self:
        """The state before the first tile. pairs: [b], approximate scores of the pairs, from which the shift on a CPU follows."""
        shift = torch.where(valid, pairs, -torch.inf).amax() - PAIR_MARGIN
        shift = torch.where(shift.isfinite(), shift, 0).clamp_(min=0)  # without a shift a product is faster
        zeros, weight = torch.zeros_like(pairs), valid.to(pairs.dtype)
        sums = cls(shift, zeros, zeros.clone(), pairs.new_zeros(texts), valid, weight, first)
        return sums if pairs.device.type == "cpu" else sums.with_own_shifts()

    def with_own_shifts(self) -> Self:
        """The state before the first tile, for scores of any range."""
        row, column = (torch.full_like(sums, -torch.inf) for sums in (self.row, self.column))
        pair = torch.zeros_like(self.pair)
        return replace(self, shift=torch.zeros_like(self.shift), pair=pair, row=row, column=column, one_shift=False)

    def update(self, rows: slice, columns: slice, scores: Tensor) -> None:
        """Add a tile of scores, less the shift. Overwrites the scores: with `one_shift` by their exponentials."""
        offset = self.first + rows.start - columns.start
        if own := rows_of_pairs(scores, offset):
            self.pair[rows][own.start : own.stop] = pairs_in_tile(scores, offset)
        if self.one_shift:
            exponentials = scores.exp_()
            self.row[rows].add_(exponentials.sum(1))
            self.column[columns].addmv_(exponentials.T, self.weight[rows])
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
    by_row, by_column = (-row).exp()[:, None], (-column).exp()
    total = torch.zeros_like(x)
    total_texts = x.new_zeros(texts.shape) if need_text_grad else None
    for tile in iterate_tiles(x, texts, valid_texts, stats.shift):
        rows, columns = tile.rows, tile.columns
        if one_shift:
            weights = stats.exponentials.popleft() if stats.exponentials else tile.scores().exp_()
            weights.mul_(by_row[rows] + by_column[columns])
        else:
            scores = tile.scores()
            weights = (scores - row[rows, None]).exp_() + scores.sub_(column[columns]).exp_()
        # Subtracted before the product: the weight of a clear pair is nearly 2, and after the product digits would be lost.
        if rows_of_pairs(weights, offset := first + rows.start - columns.start):
            pairs_in_tile(weights, offset).sub_(2)
        add_product(total[rows], weights, tile.across)
        if total_texts is not None:
            weights.masked_fill_(~valid[rows, None], 0)  # invalid rows hold any numbers, inf too
            add_product(total_texts[columns], weights.T, tile.images.T)
    if total_texts is not None:
        total_texts.masked_fill_(~valid_texts[:, None], 0)
    return total.masked_fill_(~valid[:, None], 0), total_texts


def is_in_window(shifted: Tensor, counts: Tensor) -> bool:
    """Whether all valid log-sum-exps lie where one shift is exact. False on a GPU, for which the host would have to wait."""
    return shifted.device.type == "cpu" and bool((((shifted > WINDOW_LOW) & (shifted < WINDOW_HIGH)) | ~counts).all())


def rows_of_pairs(tile: Tensor, offset: int) -> range:
    """The rows of a tile that have a number on its diagonal number `offset`."""
    height, width = tile.shape
    return range(max(0, -offset), min(height, width - offset))


def pairs_in_tile(tile: Tensor, offset: int) -> Tensor:
    """A view of the scores of pairs in a tile: the tile's diagonal number `offset`, which may be empty."""
    return tile.diagonal(offset) if rows_of_pairs(tile, offset) else tile[0, :0]
