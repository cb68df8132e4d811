"""`nev.losses.tiles` on an NVIDIA GPU: the same two walks, each in a Triton kernel, so that no score is ever in memory.

The scores of a tile live in registers: their log-sum-exps, or their weights and the product with these, are taken there, where
PyTorch writes a tile and reads it again for each of a dozen operations. What several programs have parts of is summed here by
PyTorch, in a fixed order: results are deterministic.

float32 means float32 here, unless `torch.set_float32_matmul_precision` allows TF32: see `in_parts` for fp16 texts, which is what
sidecars hold; for others Triton makes three products in TF32 of one.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nev.losses.tiles import RunningArgmax, Statistics


class Blocks(NamedTuple):
    """What a program takes at once: rows of its own, columns of a tile, numbers of D in a product for scores (depth) and in one
    of their weights (wide); Triton's warps, and stages of loads under way. The first four are powers of 2, on a GPU >= 16.
    """

    rows: int
    columns: int
    depth: int
    wide: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """What Triton compiles a kernel with. It warns where fused multiply-adds are left to it: its default will change."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# By what the compiler says of registers and shared memory for compute capabilities 8.0 to 12.0; no GPU has timed them yet.
HALF = Blocks(128, 128, 32, 32, 8, 3)
SINGLE = Blocks(64, 64, 32, 32, 8, 2)
PROGRAMS = 256  # about as many run where rows are few: they split the columns then. Large GPUs have 150 processors
PARTIAL_BYTES = 2**27  # the most that parts of what is summed here take (up to D = 1,024), and as much again meanwhile


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
    x: Tensor, texts: Tensor, valid: Tensor, valid_texts: Tensor, first: int, blocks: Blocks | None = None
) -> Statistics:
    """As `nev.losses.tiles.statistics`, with a shift of 0. x: float32, below fp16's 65,504 where texts are fp16."""
    from nev.losses import kernels

    (b, width), many = x.shape, len(texts)
    x, texts = aligned(x), aligned(texts)
    counts, text_counts = as_bytes(valid), as_bytes(valid_texts)
    blocks = blocks or blocks_for(x, texts)
    column = x.new_full((many,), -torch.inf)
    found = []
    for rows in chunks(b, blocks, 4 * many / blocks.rows):
        parts = in_parts(x[rows], texts)
        n = parts.shape[1]
        row_blocks, splits, span = programs(n, many, blocks)
        row, own, score = x.new_empty(3, splits, n)
        best = torch.empty(splits, n, dtype=torch.int32, device=x.device)
        partial = x.new_empty(row_blocks, many)
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            kernels.statistics[row_blocks, splits](
                *(parts, parts.stride(0), parts.stride(1), counts[rows], n),
                *(texts, texts.stride(0), text_counts, many),
                *(width, first + rows.start, span, row, own, score, best, partial),
                *(len(parts), precision(), blocks.rows, blocks.columns, blocks.depth),
                **blocks.options(),
            )
        column = torch.logaddexp(column, partial.logsumexp(0))
        highest = score.amax(0)
        text = torch.where(score == highest, best, many).amin(0)  # the first of equal ones
        found.append((row.logsumexp(0), own.sum(0), highest, text.long()))
    row, own, highest, text = (torch.cat(several) for several in zip(*found, strict=True))
    return Statistics(row, column, own, RunningArgmax(highest, text), x.new_zeros(()))


def gradient(
    x: Tensor,
    texts: Tensor,
    valid: Tensor,
    valid_texts: Tensor,
    first: int,
    found: Statistics,
    of_texts: bool,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `nev.losses.tiles.gradient`, with what `statistics` of this module found."""
    images = aligned(x), as_bytes(valid), found.row
    others = aligned(texts), as_bytes(valid_texts), found.column
    total = weighted(images, others, first, blocks)
    return total, weighted(others, images, -first, blocks) if of_texts else None


Side = tuple[Tensor, Tensor, Tensor]  # a matrix [n, D], which of its rows count, uint8 [n], and their log-sum-exps [n]


def weighted(of: Side, others: Side, first: int, blocks: Blocks | None) -> Tensor:
    """The sum of the other side's rows, each times its weight, for each row of one: float32 [n, D], 0 where it does not count.

    first: the other side's number of the pair of row 0.
    """
    from nev.losses import kernels

    (matrix, counts, lse), (columns, column_counts, column_lse) = of, others
    blocks = blocks or blocks_for(matrix, columns)
    width = matrix.shape[1]
    total = torch.empty(matrix.shape, dtype=torch.float32, device=matrix.device)
    for rows in chunks(len(matrix), blocks, 4 * width):
        parts = in_parts(matrix[rows], columns)
        n = parts.shape[1]
        row_blocks, splits, span = programs(n, len(columns), blocks)
        partial = total.new_zeros(splits, n, width)
        with torch.cuda.device_of(total):  # type: ignore[no-untyped-call]
            kernels.gradient[row_blocks, splits](
                *(parts, parts.stride(0), parts.stride(1), counts[rows], lse[rows], n),
                *(columns, columns.stride(0), column_counts, column_lse, len(columns)),
                *(width, first + rows.start, span, partial),
                *(len(parts), precision(), blocks.rows, blocks.columns, blocks.depth, blocks.wide),
                **blocks.options(),
            )
        torch.sum(partial, 0, out=total[rows])
    return total


def blocks_for(rows: Tensor, columns: Tensor) -> Blocks:
    """What suits the tensor cores that the products of these run on."""
    return HALF if rows.dtype == torch.float32 and columns.dtype == torch.float16 else SINGLE


def chunks(n: int, blocks: Blocks, row_bytes: float) -> list[slice]:
    """n rows in whole blocks, so many at once as `PARTIAL_BYTES` allows where each takes row_bytes."""
    step = blocks.rows * max(1, int(PARTIAL_BYTES / (row_bytes * blocks.rows)))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def programs(rows: int, columns: int, blocks: Blocks) -> tuple[int, int, int]:
    """(blocks of rows, parts that the columns are split into, columns of a part)."""
    row_blocks, tiles = -(-rows // blocks.rows), -(-columns // blocks.columns)
    span = -(-tiles // min(tiles, max(1, PROGRAMS // row_blocks)))
    return row_blocks, -(-tiles // span), span * blocks.columns


def in_parts(rows: Tensor, columns: Tensor) -> Tensor:
    """[parts, n, D], whose sum are the rows, to be multiplied with these columns.

    float32 rows for fp16 columns are two fp16 ones, 22 bits of a number and never less than 3e-8 of 1, or one where TF32 would
    do, which has no more bits. Everything else is left as it is.
    """
    if rows.dtype != torch.float32 or columns.dtype != torch.float16:
        return rows[None]
    high = rows.half()
    if precision() == "tf32":
        return high[None]
    return torch.stack([high, (rows - high).half()])


def precision() -> str:
    """How Triton multiplies float32: as three products in TF32, or one where torch is allowed that too."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def aligned(rows: Tensor) -> Tensor:
    """Rows [n, D] whose numbers lie side by side, from multiples of 16 bytes on if D allows it: a thread loads as many at once.

    The rows of gathered texts lie D + 1 numbers apart: they are copied.
    """
    fits = rows.stride(1) == 1 and rows.stride(0) * rows.element_size() % 16 == 0
    return rows if fits else rows.contiguous()


def as_bytes(counts: Tensor) -> Tensor:
    """bool [n] as Triton reads it: uint8 [n], one after the other."""
    return counts.contiguous().view(torch.uint8)
