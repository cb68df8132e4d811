"""Validation inside training: every rank embeds its share of the validation set, rank 0 scores the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.data.block import Block, BlockReader
from nev.data.index import DataError, Index, read_column
from nev.data.plan import in_order
from nev.data.sidecar import WRITE_AGAIN, sidecar_location, vectors_of
from nev.data.storage import filesystem, join
from nev.eval.retrieval import retrieval
from nev.eval.zeroshot import zero_shot

if TYPE_CHECKING:
    import torch

Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


class Embedded(NamedTuple):
    """A validation set in the shared space, in index order.

    images: float32 [n, D]; valid: bool [n], False where the image could not be decoded; labels: int64 [n], -1 if unknown.
    """

    images: NDArray[np.float32]
    valid: NDArray[np.bool_]
    labels: NDArray[np.int64]


class Result(NamedTuple):
    """The metrics of a validation, and the vectors that they were computed from."""

    metrics: dict[str, float]
    embedded: Embedded


@dataclass(frozen=True)
class Validation:
    """What to score. classes: unit float32 [C, D] or None; retrieval uses the captions' sidecar under `text_key`."""

    reader: BlockReader
    batch: int
    classes: NDArray[np.float32] | None
    retrieval: bool
    text_key: str
    text_width: int


def metric_names(zero_shot_classes: int, retrieves: bool) -> list[str]:
    """What a validation with so many classes (0: no zero-shot) and with or without retrieval can be judged by."""
    names = [f"zero_shot/top{k}" for k in (1, 5) if k < zero_shot_classes]
    ways = ("text_to_image", "image_to_text") if retrieves else ()
    return names + [f"retrieval/{way}/r{k}" for way in ways for k in (1, 5, 10)]


def validate(task: Validation, embed: Embed, rank: int = 0, world: int = 1, lockstep: bool = False) -> Result | None:
    """Embed rank r's blocks (every W-th), gather on rank 0, score. Returns the result on rank 0, None on the others.

    lockstep: every rank must call `embed` equally often, as a tower under FSDP wants it.

    Collectives: one gather of objects, none where W = 1.
    """
    parts = embed_blocks(task, embed, rank, world, lockstep)
    gathered: list[Any] = [None] * world
    if world > 1:
        import torch.distributed as dist

        dist.gather_object(parts, gathered if rank == 0 else None)
    else:
        gathered = [parts]
    if rank != 0:
        return None
    merged = sorted((number, part) for share in gathered for number, part in share.items())
    embedded = collect([part for _, part in merged])
    return Result(score(task, embedded), embedded)


def embed_blocks(task: Validation, embed: Embed, rank: int, world: int, lockstep: bool) -> dict[int, Embedded]:
    """Embed blocks rank, rank + W, ... of the set, by block number."""
    blocks = list(enumerate(in_order(task.reader.index.rows, task.batch)))
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


def embedded_file(task: Validation) -> str:
    """The file in a checkpoint that keeps the vectors of its validation: who looks at the results need not embed again."""
    return f"validation-{task.reader.index.fingerprint[:16]}.safetensors"


def embedded_bytes(embedded: Embedded) -> bytes:
    """A set as safetensors."""
    from safetensors.numpy import save

    return save(embedded._asdict())


def load_embedded(checkpoint: str, task: Validation) -> Embedded | None:
    """The vectors of this validation set that a checkpoint keeps, or None."""
    from safetensors.numpy import load

    fs, path = filesystem(join(checkpoint, embedded_file(task)))
    return Embedded(**load(fs.cat_file(path))) if fs.exists(path) else None


def score(task: Validation, embedded: Embedded) -> dict[str, float]:
    """The metrics that the task asks for, over the rows that could be decoded."""
    metrics = {"val/rows": float(len(embedded.valid)), "val/bad_rows": float((~embedded.valid).sum())}
    if task.classes is not None:
        labelled = embedded.valid & (embedded.labels >= 0)
        _refuse_none(labelled, task, "a label and an image that can be decoded")
        metrics |= zero_shot(embedded.images[labelled], embedded.labels[labelled], task.classes)
    if task.retrieval:
        texts, owner = load_texts(task.reader.index, task.text_key, task.text_width)
        captioned = np.isin(np.arange(len(embedded.valid)), owner) & embedded.valid
        _refuse_none(captioned, task, "a caption and an image that can be decoded")
        kept = captioned[owner]
        position = np.cumsum(captioned) - 1
        metrics |= retrieval(embedded.images[captioned], texts[kept], position[owner[kept]])
    return metrics


def _refuse_none(rows: NDArray[np.bool_], task: Validation, what: str) -> None:
    if not rows.any():
        raise DataError(f"{task.reader.index.root}: no row has {what}, so there is nothing to score. Mend data.val.")


def load_texts(index: Index, key: str, width: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Every caption's vector, unit float32 [m, D], and the row that it describes, int64 [m], in index order."""
    vectors, owner, row = [], [], 0
    for shard in range(len(index.paths)):
        column = read_column(sidecar_location(index, shard, key), "vectors", WRITE_AGAIN)
        part, starts = vectors_of(column, width)
        vectors.append(part.astype(np.float32))
        owner.append(row + np.repeat(np.arange(len(starts) - 1), np.diff(starts)))
        row += len(starts) - 1
    stacked = np.concatenate(vectors)
    return stacked / np.linalg.norm(stacked, axis=1, keepdims=True), np.concatenate(owner)


def embedder(
    forward: Callable[[torch.Tensor], torch.Tensor],
    normalise: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> Embed:
    """Wrap a vision tower: uint8 [n, S, S, 3] in, unit float32 [n, D] out, without a graph."""
    import torch

    @torch.inference_mode()
    def embed(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = normalise(torch.tensor(images, device=device))
        vectors: NDArray[np.float32] = forward(pixels).float().cpu().numpy()
        return vectors

    return embed
