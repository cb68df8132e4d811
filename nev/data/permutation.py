"""Permutations that are the same in every process and every release of NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def draw_bits(count: int, *seed: int) -> NDArray[np.uint64]:
    """Random numbers: uint64 [count].

    NumPy promises that the raw bits of a BitGenerator stay the same over releases, but not Generator.permutation.
    """
    return np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)


def permute_groups(count: int, *seed: int) -> NDArray[np.int32]:
    """The numbers 0 to count - 1, permuted: int32 [count]. For millions of row groups."""
    keys = draw_bits(count, *seed)
    # The low bits become the number of the row group: keys are then distinct, and a sort in place gives the permutation in half
    # the time of argsort.
    bits = np.uint64(count.bit_length())
    keys = keys >> bits << bits | np.arange(count, dtype=np.uint64)
    keys.sort()
    return (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int32)


def permute_rows(count: int, *seed: int) -> NDArray[np.int64]:
    """The numbers 0 to count - 1, permuted: int64 [count]. For the rows of a window."""
    return np.argsort(draw_bits(count, *seed), kind="stable")
