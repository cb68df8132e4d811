"""A rank's batch: blocks of the stream, checked against the plan, copied into one buffer, sent to the device."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from nev.data.block import Block
from nev.train.core.step import Batch

COLUMNS = {"image", "text", "valid", "set"}  # of a block, for the device


class StreamError(RuntimeError):
    """The stream has other rows than the plan names for this step."""


def next_block(blocks: Iterator[Block], expected: int) -> Block:
    """The next block of the stream. Raises StreamError unless it is block `expected` of the plan."""
    block = next(blocks, None)
    if block is None:
        raise StreamError(f"the stream ended before block {expected}")
    if not (block["block"] == expected).all():
        raise StreamError(f"the stream gave block {int(block['block'][0])} where the plan says {expected}")
    return block


class BatchBuilder:
    """Copies blocks into host memory (pinned for a GPU), then all of them to the device.

    room: blocks in a batch. Where a rank has fewer blocks, since W does not divide the blocks of a step, the rows that are left
    are invalid, so no loss sees them.
    """

    def __init__(self, room: int, block_rows: int, device: torch.device) -> None:
        self._rows, self._block_rows, self._device = room * block_rows, block_rows, device
        self._host: dict[str, Tensor] = {}
        self._filled = 0

    def add(self, block: Block) -> None:
        """Copy the next block. The block may change afterwards."""
        place = slice(self._filled, self._filled + self._block_rows)
        for name in COLUMNS & block.keys():
            column = block[name]
            if name not in self._host:
                dtype = torch.from_numpy(np.empty(0, column.dtype)).dtype
                shape = (self._rows, *column.shape[1:])
                self._host[name] = torch.empty(shape, dtype=dtype, pin_memory=self._device.type == "cuda")
            np.copyto(self._host[name].numpy()[place], column)
        self._filled = place.stop

    def batch(self) -> Batch:
        """The batch on the device. Tokens have as many columns as the longest text, one at least."""
        for column in self._host.values():
            column[self._filled :] = 0
        text = self._host["text"]
        if not text.is_floating_point():
            text[self._filled :] = -1
            used = text[:, : max(1, int((text >= 0).sum(1).amax()))]
            self._host["text"] = used.pin_memory() if self._device.type == "cuda" else used.contiguous()
        images, tokens, valid = (
            self._host[name].to(self._device, non_blocking=True) for name in ("image", "text", "valid")
        )
        sets = self._host["set"].to(self._device, torch.int64, non_blocking=True) if "set" in self._host else None
        return Batch(images, tokens, valid, sets)
