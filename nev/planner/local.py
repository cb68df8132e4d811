"""A machine without GPUs: training and decoding share its cores, so their times add up."""

from __future__ import annotations


def shared_cores_step_s(
    train_s: float, workers: int, batch: int, decode_core_s: float, blocks: int, block_core_s: float
) -> float:
    """Seconds of a step on one machine that has a training thread for each core, in W workers.

    train_s: of the step, its collectives included, where the blocks are in memory.
    workers: W. Whatever else takes a core stops a thread of a worker, and the other threads of that worker wait for it. So the
        time of decoding and stream divides by W and not by the cores.
    batch: images of the step, over all workers. decode_core_s: core-seconds of an image.
    blocks: of the step. block_core_s: core-seconds that Ray takes to make a block and to hand it on.
    """
    return train_s + (batch * decode_core_s + blocks * block_core_s) / workers
