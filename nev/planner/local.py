"""A machine without GPUs: training and decoding share its cores, so their core-seconds add up."""

from __future__ import annotations


def shared_cores_step_s(
    batch: int,
    cores: int,
    train_core_s: float,
    decode_core_s: float,
    blocks: int,
    block_core_s: float,
    collective_s: float,
) -> float:
    """Seconds of a step of W ranks on one machine whose cores are all busy.

    batch: images of a step, over all ranks.
    train_core_s, decode_core_s: core-seconds of an image. The number of ranks does not change them.
    blocks: of a step. block_core_s: core-seconds that Ray takes to make a block and to hand it on.
    collective_s: of a step; nothing is hidden, since the cores that send are those that compute.
    """
    core_s = batch * (train_core_s + decode_core_s) + blocks * block_core_s
    return core_s / cores + collective_s
