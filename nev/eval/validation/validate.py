"""Validation inside training: every rank embeds its share of the validation set, rank 0 scores the whole set."""

from __future__ import annotations

import numpy as np

from nev.common.collectives import gather_on_rank_0
from nev.data.block import Block
from nev.data.block_plan import sequential_blocks
from nev.data.text_sidecar import Encode
from nev.embed.images import are_finite
from nev.eval.suite.vectors import Embedded, Texts
from nev.eval.validation.scoring import score_validation
from nev.eval.validation.task import Result, Validation
from nev.eval.validation.vectors import load_texts
from nev.inference.forward import Embed


def validate(
    task: Validation,
    embed: Embed,
    scale: float,
    encode: Encode | None = None,
    rank: int = 0,
    world: int = 1,
    lockstep: bool = False,
) -> Result | None:
    """Embed blocks rank, rank + W, ... of the set, gather the vectors on rank 0, score there. None on other ranks.

    embed: uint8 [n, S, S, 3] to float32 [n, D], rows of unit length.
    scale: 1 / temperature of the model.
    encode: sentences to vectors, where the text tower runs in the training loop.
    lockstep: every rank calls `embed` and `encode` equally often, as towers under FSDP need it.
    Collectives: one gather of objects, none where W = 1. Raises DataError on rank 0 where no row can be scored.
    """
    parts = embed_blocks(task, embed, rank, world, lockstep)
    gathered = gather_on_rank_0(parts, rank, world)
    texts = load_texts(task, encode) if rank == 0 or (lockstep and encode) else Texts()
    if rank != 0:
        return None
    merged = sorted((number, part) for share in gathered for number, part in share.items())
    embedded = concatenate([part for _, part in merged])
    return Result(score_validation(task, embedded, texts, scale), embedded, texts)


def embed_blocks(task: Validation, embed: Embed, rank: int, world: int, lockstep: bool) -> dict[int, Embedded]:
    """Embed blocks rank, rank + W, ... of the set. Returns them by block number."""
    blocks = list(enumerate(sequential_blocks(task.reader.index.rows, task.batch)))
    share = {number: embed_block(task.reader.read(segments), embed) for number, segments in blocks[rank::world]}
    if lockstep and len(share) < -(-len(blocks) // world):  # lower ranks have one block more
        embed(np.zeros_like(task.reader.allocate(1)))
    return share


def embed_block(block: Block, embed: Embed) -> Embedded:
    """Embed the pictures of a block."""
    vectors = embed(block["image"])
    return Embedded(vectors, block["valid"] & are_finite(vectors), block["label"])


def concatenate(parts: list[Embedded]) -> Embedded:
    """Blocks in their order, as one set."""
    return Embedded(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
