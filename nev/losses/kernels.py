"""The Triton kernels that `nev.losses.fused` runs. Import this module only where Triton is installed.

A program owns BLOCK_M rows of one side and goes over the columns, the rows of the other side, BLOCK_N at a time. The rows are
images and the columns texts, or the other way round. The matrix of rows [n, D] is given as a sum of PARTS matrices. With fp16
columns two fp16 parts hold 22 bits of each number, and two products on fp16 tensor cores are cheaper than the three products in
TF32 that Triton makes of one product in float32.

Each number is written by one program, so the results are deterministic. Row numbers times strides are 64 bits wide.
"""

import triton
import triton.language as tl

# The weights of the gradient lie between -2 and 2, mostly near 0. fp16's smallest number is 6e-8; after scaling it is 4e-12.
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
    valid_rows,
    columns,  # [m, D]
    column_stride,
    column,
    valid_columns,
    D,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scores [BLOCK_M, BLOCK_N], -inf for invalid columns. Invalid rows and columns are not read."""
    depth = tl.arange(0, BLOCK_K)
    a_at = rows + row.to(tl.int64)[:, None] * row_stride + depth[None, :]
    b_at = columns + column.to(tl.int64)[None, :] * column_stride + depth[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        inside = start + depth < D
        b = tl.load(b_at + start, mask=valid_columns[None, :] & inside[:, None], other=0.0)
        for part in tl.static_range(PARTS):
            a = tl.load(a_at + part * part_stride + start, mask=valid_rows[:, None] & inside[None, :], other=0.0)
            total = _times(a, b, total, PRECISION)
    return tl.where(valid_columns[None, :], total, -float("inf"))


@triton.jit(do_not_specialize=["first"])
def statistics(
    rows,  # [PARTS, n, D]
    part_stride,
    row_stride,
    valid_rows,  # uint8 [n]
    n,
    columns,  # [m, D]
    column_stride,
    valid_columns,  # uint8 [m]
    m,
    D,
    first,
    width,
    row_lse,  # [splits, n], and so the next three
    pair_score,
    best_score,
    best,
    column_lse,  # [row blocks, m]
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Statistics of the scores. Program (i, j) takes row block i and `width` columns from j * width on.

    row_lse: log-sum-exp over these columns.
    pair_score: score with column first + row, 0 if that column is not among these.
    best_score, best: the highest score and its column; of equal scores the first column.
    column_lse: log-sum-exp over the valid rows.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = tl.load(valid_rows + row, mask=row < n, other=0) != 0
    end = tl.minimum(split * width + width, m)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    top_at = tl.zeros((BLOCK_M,), tl.int32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    pair = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(split * width, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        valid_tile = tl.load(valid_columns + column, mask=column < end, other=0) != 0
        scores = _scores(
            rows, part_stride, row_stride, row, valid, columns, column_stride, column, valid_tile, D,
            PARTS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        pair += tl.sum(tl.where(column[None, :] == first + row[:, None], scores, 0.0), 1)

        highest = tl.max(scores, 1)
        at = tl.min(tl.where(scores == highest[:, None], column[None, :], m), 1)
        top_at = tl.where(highest > top, at, top_at)
        higher = tl.maximum(top, highest)
        around = tl.where(
            higher == -float("inf"), 0.0, higher
        )  # without a valid column so far, -inf less -inf would be NaN
        total = total * tl.exp(top - around) + tl.sum(tl.exp(scores - around[:, None]), 1)
        top = higher

        scores = tl.where(valid[:, None], scores, -float("inf"))
        highest = tl.max(scores, 0)
        around = tl.where(highest == -float("inf"), 0.0, highest)
        lse = around + tl.log(tl.sum(tl.exp(scores - around[None, :]), 0))
        tl.store(column_lse + block.to(tl.int64) * m + column, lse, mask=column < end)
    around = tl.where(top == -float("inf"), 0.0, top)
    out = split.to(tl.int64) * n + row
    tl.store(row_lse + out, around + tl.log(total), mask=row < n)
    tl.store(pair_score + out, pair, mask=row < n)
    tl.store(best_score + out, top, mask=row < n)
    tl.store(best + out, top_at, mask=row < n)


@triton.jit(do_not_specialize=["first"])
def gradient(
    rows,  # [PARTS, n, D]
    part_stride,
    row_stride,
    valid_rows,  # uint8 [n]
    row_lse,  # [n]
    n,
    columns,  # [m, D]
    column_stride,
    valid_columns,  # uint8 [m]
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
    """Weighted sums of the columns. Program (i, j) adds `width` columns from j * width on to row block i of out[j].

    The D sums of a row do not fit in the registers of a program, so they stay in memory, where no other program uses them.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = tl.load(valid_rows + row, mask=row < n, other=0) != 0
    by_row = tl.load(row_lse + row, mask=valid, other=0.0)
    end = tl.minimum(split * width + width, m)
    dim_offsets = tl.arange(0, BLOCK_D)
    out_at = out + (split.to(tl.int64) * n + row)[:, None] * D + dim_offsets[None, :]
    for start in range(split * width, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        valid_tile = tl.load(valid_columns + column, mask=column < end, other=0) != 0
        by_column = tl.load(column_lse + column, mask=valid_tile, other=0.0)
        scores = _scores(
            rows, part_stride, row_stride, row, valid, columns, column_stride, column, valid_tile, D,
            PARTS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        weights = tl.exp(scores - by_row[:, None]) + tl.exp(scores - by_column[None, :])
        # Subtracted before the product: the weight of a clear pair is nearly 2, and after the product digits would be lost.
        weights = tl.where(column[None, :] == first + row[:, None], weights - 2.0, weights)
        weights = tl.where(valid_tile[None, :], weights, 0.0)  # invalid rows are not stored
        b_at = columns + column.to(tl.int64)[:, None] * column_stride + dim_offsets[None, :]
        for chunk in range(0, D, BLOCK_D):
            inside = chunk + dim_offsets < D
            b = tl.load(b_at + chunk, mask=valid_tile[:, None] & inside[None, :], other=0.0)
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
            mask = valid[:, None] & inside[None, :]
            tl.store(out_at + chunk, tl.load(out_at + chunk, mask=mask, other=0.0) + part, mask=mask)
        tl.debug_barrier()  # a number that one thread has written may be read by another thread in the next round
