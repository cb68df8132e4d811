"""`nev.losses.tiles` on an NVIDIA GPU: the same two passes, each in a Triton kernel (`nev.losses.kernels`).

The scores of a tile stay in registers, where the kernel takes their log-sum-exps, or their weights and the product with these.
PyTorch would write and read a tile for each of a dozen operations. Partial results of several programs are summed by PyTorch, in
a fixed order, so the results are deterministic.

Products have the precision of float32, unless `torch.set_float32_matmul_precision` allows TF32. With fp16 texts, as sidecars
hold them, images are split in two fp16 parts (`split_half`). With other texts Triton makes three products in TF32 of one.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections import deque
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nev.losses.tiles import RunningArgmax, Statistics


class BlockSizes(NamedTuple):
    """Sizes of a Triton program. The first four are powers of 2, and on a GPU at least 16.

    rows: rows that a program owns.
    columns: columns of a tile.
    depth: numbers of D in one product for scores.
    dims: numbers of D in one product of the weights.
    warps: Triton's `num_warps`.
    stages: Triton's `num_stages`, loads that run ahead.
    """

    rows: int
    columns: int
    depth: int
    dims: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """Compile options of a kernel. `enable_fp_fusion` is set because its default will change, and Triton warns of that."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# HALF and SINGLE: chosen by the registers and shared memory that the compiler reports for compute capabilities 8.0 to 12.0.
# WIDE: timed on an H200, where HALF takes 1.25 times as long for the statistics and 1.7 times as long for the gradient.
WIDE = BlockSizes(128, 256, 64, 64, 8, 3)
WIDE_CAPABILITIES = (9, 10)  # a program has 227 KiB of shared memory there, and WIDE takes 192 KiB
HALF = BlockSizes(128, 128, 32, 32, 8, 3)
SINGLE = BlockSizes(64, 64, 32, 32, 8, 2)
PROGRAMS = (
    256  # least number of programs, roughly: with few rows they split the columns. Large GPUs have 150 processors
)
PARTIAL_BYTES = 2**27  # most bytes of partial results (up to D = 1,024); their sum takes as much again for a moment


def unsupported_reason(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, or None where they can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the device is {device}, not an NVIDIA GPU"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"the GPU's compute capability is {capability[0]}.{capability[1]}, below 8.0"
    if find_spec("triton") is None:
        return "the Python package triton is not installed"
    # Triton builds its launcher with a C compiler and Python's headers, which a slim image may lack.
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "there is no C compiler (gcc or clang, or the variable CC)"
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").is_file():
        return "Python's headers are not installed (Python.h: the package python3-dev)"
    return None


def statistics(
    x: Tensor, texts: Tensor, valid: Tensor, valid_texts: Tensor, first: int, blocks: BlockSizes | None = None
) -> Statistics:
    """As `nev.losses.tiles.statistics`, with a shift of 0. x: float32; with fp16 texts, below fp16's largest number, 65,504."""
    from nev.losses import kernels

    (b, width), many = x.shape, len(texts)
    x, texts = align(x), align(texts)
    valid_bytes, valid_text_bytes = as_bytes(valid), as_bytes(valid_texts)
    blocks = blocks or choose_blocks(x, texts)
    column = x.new_full((many,), -torch.inf)
    stats = []
    for rows in row_chunks(b, blocks, 4 * many / blocks.rows):
        parts = split_half(x[rows], texts)
        n = parts.shape[1]
        row_blocks, splits, span = split_work(n, many, blocks)
        row, pair, score = x.new_empty(3, splits, n)
        best = torch.empty(splits, n, dtype=torch.int32, device=x.device)
        partial = x.new_empty(row_blocks, many)
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            kernels.statistics[row_blocks, splits](
                *(parts, parts.stride(0), parts.stride(1), valid_bytes[rows], n),
                *(texts, texts.stride(0), valid_text_bytes, many),
                *(width, first + rows.start, span, row, pair, score, best, partial),
                *(len(parts), precision(), blocks.rows, blocks.columns, blocks.depth),
                **blocks.options(),
            )
        column = torch.logaddexp(column, partial.logsumexp(0))
        highest = score.amax(0)
        text = torch.where(score == highest, best, many).amin(0)  # of equal scores the first text
        stats.append((row.logsumexp(0), pair.sum(0), highest, text.long()))
    row, pair, highest, text = (torch.cat(chunks) for chunks in zip(*stats, strict=True))
    return Statistics(row, column, pair, RunningArgmax(highest, text, highest), x.new_zeros(()), deque())


def gradient(
    x: Tensor,
    texts: Tensor,
    valid: Tensor,
    valid_texts: Tensor,
    first: int,
    stats: Statistics,
    need_text_grad: bool,
    blocks: BlockSizes | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `nev.losses.tiles.gradient`, with the result of this module's `statistics`."""
    images = align(x), as_bytes(valid), stats.row
    others = align(texts), as_bytes(valid_texts), stats.column
    total = weighted_sums(images, others, first, blocks)
    return total, weighted_sums(others, images, -first, blocks) if need_text_grad else None


Side = tuple[Tensor, Tensor, Tensor]  # rows [n, D], which of them are valid, uint8 [n], and their log-sum-exps [n]


def weighted_sums(side: Side, others: Side, first: int, blocks: BlockSizes | None) -> Tensor:
    """For each row of `side`, the sum of the rows of `others`, each times its weight: float32 [n, D], 0 for invalid rows.

    first: number of the row of `others` that is a pair with row 0 of `side`.
    """
    from nev.losses import kernels

    (matrix, valid, lse), (columns, valid_columns, column_lse) = side, others
    blocks = blocks or choose_blocks(matrix, columns)
    width = matrix.shape[1]
    total = torch.empty(matrix.shape, dtype=torch.float32, device=matrix.device)
    for rows in row_chunks(len(matrix), blocks, 4 * width):
        parts = split_half(matrix[rows], columns)
        n = parts.shape[1]
        row_blocks, splits, span = split_work(n, len(columns), blocks)
        partial = total.new_zeros(splits, n, width)
        with torch.cuda.device_of(total):  # type: ignore[no-untyped-call]
            kernels.gradient[row_blocks, splits](
                *(parts, parts.stride(0), parts.stride(1), valid[rows], lse[rows], n),
                *(columns, columns.stride(0), valid_columns, column_lse, len(columns)),
                *(width, first + rows.start, span, partial),
                *(len(parts), precision(), blocks.rows, blocks.columns, blocks.depth, blocks.dims),
                **blocks.options(),
            )
        torch.sum(partial, 0, out=total[rows])
    return total


def choose_blocks(rows: Tensor, columns: Tensor) -> BlockSizes:
    """The sizes for the tensor cores that multiply these rows and columns."""
    if rows.dtype != torch.float32 or columns.dtype != torch.float16:
        return SINGLE
    on_gpu = rows.device.type == "cuda"
    return WIDE if on_gpu and torch.cuda.get_device_capability(rows.device)[0] in WIDE_CAPABILITIES else HALF


def row_chunks(n: int, blocks: BlockSizes, row_bytes: float) -> list[slice]:
    """Split n rows in chunks of whole blocks. The partial results of a chunk, `row_bytes` a row, fit in `PARTIAL_BYTES`."""
    step = blocks.rows * max(1, int(PARTIAL_BYTES / (row_bytes * blocks.rows)))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def split_work(rows: int, columns: int, blocks: BlockSizes) -> tuple[int, int, int]:
    """How programs share the scores: (number of row blocks, number of column parts, columns of a part)."""
    row_blocks, tiles = -(-rows // blocks.rows), -(-columns // blocks.columns)
    span = -(-tiles // min(tiles, max(1, PROGRAMS // row_blocks)))
    return row_blocks, -(-tiles // span), span * blocks.columns


def split_half(rows: Tensor, columns: Tensor) -> Tensor:
    """Write the rows as a sum of parts that are multiplied with the columns: [parts, n, D].

    float32 rows with fp16 columns: two fp16 parts, which together have 22 bits and an error of at most 3e-8. One part where TF32
    is allowed, which has no more bits than fp16. Other dtypes: the rows as they are, one part.
    """
    if rows.dtype != torch.float32 or columns.dtype != torch.float16:
        return rows[None]
    high = rows.half()
    if precision() == "tf32":
        return high[None]
    return torch.stack([high, (rows - high).half()])


def precision() -> str:
    """Triton's `input_precision` of float32 products: three products in TF32, or one where torch may use TF32 too."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def align(rows: Tensor) -> Tensor:
    """Rows [n, D] that are contiguous and, if D allows, start at multiples of 16 bytes, which a thread loads at once.

    Gathered texts have a row stride of D + 1 numbers, so they are copied.
    """
    fits = rows.stride(1) == 1 and rows.stride(0) * rows.element_size() % 16 == 0
    return rows if fits else rows.contiguous()


def as_bytes(valid: Tensor) -> Tensor:
    """bool [n] as Triton reads it: contiguous uint8 [n]."""
    return valid.contiguous().view(torch.uint8)
