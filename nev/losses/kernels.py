"""What `nev.losses.fused` runs on a GPU, in Triton. To be imported where Triton is there.

Rows are the side of which a program owns BLOCK_M, columns the other side, which it walks over BLOCK_N at a time: images and
texts, or the other way round. A matrix [n, D] of rows is the sum of `parts` ones, so that half precision serves float32: where
columns are fp16, two fp16 parts hold 22 bits of a number, and a product with each on fp16 tensor cores is cheaper than the
three in tf32 that Triton makes of one in float32.

Every number is written by one program, so that results are deterministic. Row numbers times strides are 64 bits wide.
"""

import triton
import triton.language as tl

# The weights of the gradient lie between -2 and 2, mostly near 0, where fp16 ends at 6e-8: so much larger, it ends at 4e-12.
ENLARGED = tl.constexpr(16384.0)


@triton.jit
def _times(a, b, total, PRECISION: tl.constexpr):
    """total plus a [m, k] times b [k, n], in fp32 unless both are fp16, summed in fp32."""
    if (a.dtype == tl.float16) and (b.dtype == tl.float16):
        total = tl.dot(a, b, total)
    else:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit
def _scores(
    rows,  # [PARTS, n, D]
    part_stride,
    row_stride,
    row,
    keep_rows,
    columns,  # [m, D]
    column_stride,
    column,
    keep_columns,
    D,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N], -inf for columns that do not count. What such rows and columns hold is not read."""
    depth = tl.arange(0, BLOCK_K)
    a_at = rows + row.to(tl.int64)[:, None] * row_stride + depth[None, :]
    b_at = columns + column.to(tl.int64)[None, :] * column_stride + depth[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        inside = start + depth < D
        b = tl.load(b_at + start, mask=keep_columns[None, :] & inside[:, None], other=0.0)
        for part in tl.static_range(PARTS):
            a = tl.load(a_at + part * part_stride + start, mask=keep_rows[:, None] & inside[None, :], other=0.0)
            total = _times(a, b, total, PRECISION)
    return tl.where(keep_columns[None, :], total, -float("inf"))


@triton.jit(do_not_specialize=["first"])
def statistics(
    rows,  # [PARTS, n, D]
    part_stride,
    row_stride,
    row_counts,  # uint8 [n]
    n,
    columns,  # [m, D]
    column_stride,
    column_counts,  # uint8 [m]
    m,
    D,
    first,
    width,
    row_lse,  # [splits, n], and so the next three
    own,
    best_score,
    best,
    column_lse,  # [row blocks, m]
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of program (i, j): row block i with the columns from j * width on, `width` of them.

    row_lse: log-sum-exp over these columns; own: the score with column first + row, 0 if it is not among them; best_score,
    best: the highest score and its column, the first of equal ones; column_lse: log-sum-exp over the rows that count.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    counts = tl.load(row_counts + row, mask=row < n, other=0) != 0
    end = tl.minimum(split * width + width, m)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    top_at = tl.zeros((BLOCK_M,), tl.int32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    pair = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(split * width, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        keep = tl.load(column_counts + column, mask=column < end, other=0) != 0
        scores = _scores(
            rows, part_stride, row_stride, row, counts, columns, column_stride, column, keep, D,
            PARTS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        pair += tl.sum(tl.where(column[None, :] == first + row[:, None], scores, 0.0), 1)

        highest = tl.max(scores, 1)
        at = tl.min(tl.where(scores == highest[:, None], column[None, :], m), 1)
        top_at = tl.where(highest > top, at, top_at)
        higher = tl.maximum(top, highest)
        around = tl.where(higher == -float("inf"), 0.0, higher)  # where no column counted yet, -inf less -inf were NaN
        total = total * tl.exp(top - around) + tl.sum(tl.exp(scores - around[:, None]), 1)
        top = higher

        scores = tl.where(counts[:, None], scores, -float("inf"))
        highest = tl.max(scores, 0)
        around = tl.where(highest == -float("inf"), 0.0, highest)
        lse = around + tl.log(tl.sum(tl.exp(scores - around[None, :]), 0))
        tl.store(column_lse + block.to(tl.int64) * m + column, lse, mask=column < end)
    around = tl.where(top == -float("inf"), 0.0, top)
    out = split.to(tl.int64) * n + row
    tl.store(row_lse + out, around + tl.log(total), mask=row < n)
    tl.store(own + out, pair, mask=row < n)
    tl.store(best_score + out, top, mask=row < n)
    tl.store(best + out, top_at, mask=row < n)


@triton.jit(do_not_specialize=["first"])
def gradient(
    rows,  # [PARTS, n, D]
    part_stride,
    row_stride,
    row_counts,  # uint8 [n]
    row_lse,  # [n]
    n,
    columns,  # [m, D]
    column_stride,
    column_counts,  # uint8 [m]
    column_lse,  # [m]
    m,
    D,
    first,
    width,
    out,  # [splits, n, D], of zeros
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of program (i, j): to row block i of out[j], the columns from j * width on times their weights.

    A row's D sums do not fit the registers of a program, so they lie in memory, where it alone touches them.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    counts = tl.load(row_counts + row, mask=row < n, other=0) != 0
    by_row = tl.load(row_lse + row, mask=counts, other=0.0)
    end = tl.minimum(split * width + width, m)
    wide = tl.arange(0, BLOCK_D)
    out_at = out + (split.to(tl.int64) * n + row)[:, None] * D + wide[None, :]
    for start in range(split * width, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        keep = tl.load(column_counts + column, mask=column < end, other=0) != 0
        by_column = tl.load(column_lse + column, mask=keep, other=0.0)
        scores = _scores(
            rows, part_stride, row_stride, row, counts, columns, column_stride, column, keep, D,
            PARTS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        weights = tl.exp(scores - by_row[:, None]) + tl.exp(scores - by_column[None, :])
        # Before the product: where a pair stands out, its weight is nearly 2, and the difference would lose its digits after.
        weights = tl.where(column[None, :] == first + row[:, None], weights - 2.0, weights)
        weights = tl.where(keep[None, :], weights, 0.0)  # a row that does not count is not stored
        b_at = columns + column.to(tl.int64)[:, None] * column_stride + wide[None, :]
        for chunk in range(0, D, BLOCK_D):
            inside = chunk + wide < D
            b = tl.load(b_at + chunk, mask=keep[:, None] & inside[None, :], other=0.0)
            part = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            if b.dtype == tl.float16:
                large = weights * ENLARGED
                high = large.to(tl.float16)
                part = tl.dot(high, b, part)
                if PARTS == 2:
                    part = tl.dot((large - high.to(tl.float32)).to(tl.float16), b, part)
                part = part / ENLARGED
            else:
                part = _times(weights, b, part, PRECISION)
            mask = counts[:, None] & inside[None, :]
            tl.store(out_at + chunk, tl.load(out_at + chunk, mask=mask, other=0.0) + part, mask=mask)
        tl.debug_barrier()  # what one thread has written here, another may read in the next round
