"""Validation inside training: every rank embeds its share of the validation set, rank 0 scores the whole."""

from __future__ import annotations

import numpy as np

from nev.common.collectives import gather_on_rank_0
from nev.data.block import Block
from nev.data.plan import sequential_blocks
from nev.data.sidecar import Encode
from nev.embed.images import Embed
from nev.eval.validation.scoring import Embedded, compute_shares, rank_answers
from nev.eval.validation.task import Result, Validation
from nev.eval.validation.texts import Texts
from nev.eval.validation.vectors import load_validation_texts


def validate(
    task: Validation,
    embed: Embed,
    encode: Encode | None = None,
    rank: int = 0,
    world: int = 1,
    lockstep: bool = False,
) -> Result | None:
    """Embed rank r's blocks (every W-th), gather on rank 0, score. Returns the result on rank 0, None on the others.

    encode: sentences to vectors, where the text tower runs in the loop. lockstep: every rank must call `embed` equally often,
    and `encode`, as towers under FSDP want it.

    Collectives: one gather of objects, none where W = 1.
    """
    parts = embed_blocks(task, embed, rank, world, lockstep)
    gathered = gather_on_rank_0(parts, rank, world)
    texts = load_validation_texts(task, encode) if rank == 0 or (lockstep and encode) else Texts()
    if rank != 0:
        return None
    merged = sorted((number, part) for share in gathered for number, part in share.items())
    embedded = collect([part for _, part in merged])
    return Result(score(task, embedded, texts), embedded, texts)


def embed_blocks(task: Validation, embed: Embed, rank: int, world: int, lockstep: bool) -> dict[int, Embedded]:
    """Embed blocks rank, rank + W, ... of the set, by block number."""
    blocks = list(enumerate(sequential_blocks(task.reader.index.rows, task.batch)))
    own = {number: embed_block(task.reader.read(segments, 0), embed) for number, segments in blocks[rank::world]}
    if lockstep and len(own) < -(-len(blocks) // world):  # ranks before this one have one more
        embed(np.zeros((1, task.reader.image_size, task.reader.image_size, 3), np.uint8))
    return own


def embed_block(block: Block, embed: Embed) -> Embedded:
    """One block of pictures to vectors."""
    return Embedded(embed(block["image"]), block["valid"], block["label"])


def collect(parts: list[Embedded]) -> Embedded:
    """Blocks in order, as one set."""
    return Embedded(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def score(task: Validation, embedded: Embedded, texts: Texts) -> dict[str, float]:
    """The metrics that the task asks for, over the rows that could be decoded."""
    return compute_shares(rank_answers(task.reader.index.root, embedded, texts))
