"""Validation inside training: every rank embeds its share of the validation set, rank 0 scores the whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.data.block import Block, BlockReader
from nev.data.plan import in_order
from nev.data.sidecar import Encode
from nev.eval.scoring import Embedded, rank, shares
from nev.eval.texts import Classes, Texts, all_captions, caption_owners, load_texts
from nev.eval.zeroshot import class_embeddings
from nev.storage.files import join
from nev.storage.reading import content_of

if TYPE_CHECKING:
    import torch

Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


class Result(NamedTuple):
    """The metrics of a validation, and the vectors that they were computed from."""

    metrics: dict[str, float]
    embedded: Embedded
    texts: Texts


@dataclass(frozen=True)
class Validation:
    """What to score. retrieval uses the captions' sidecars under `text_key`, None where the text tower runs in the loop."""

    reader: BlockReader
    batch: int
    classes: Classes | None
    retrieval: bool
    text_key: str | None
    text_width: int


def metric_names(zero_shot_classes: int, retrieves: bool) -> list[str]:
    """What a validation with so many classes (0: no zero-shot) and with or without retrieval can be judged by."""
    names = [f"zero_shot/top{k}" for k in (1, 5) if k < zero_shot_classes]
    ways = ("text_to_image", "image_to_text") if retrieves else ()
    return names + [f"retrieval/{way}/r{k}" for way in ways for k in (1, 5, 10)]


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
    gathered: list[Any] = [None] * world
    if world > 1:
        import torch.distributed as dist

        dist.gather_object(parts, gathered if rank == 0 else None)
    else:
        gathered = [parts]
    texts = texts_of(task, encode) if rank == 0 or (lockstep and encode) else Texts()
    if rank != 0:
        return None
    merged = sorted((number, part) for share in gathered for number, part in share.items())
    embedded = collect([part for _, part in merged])
    return Result(score(task, embedded, texts), embedded, texts)


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


def texts_of(task: Validation, encode: Encode | None) -> Texts:
    """The class prompts and captions of a task: embedded by `encode` or, without it, as they were embedded before."""
    classes = captions = owner = None
    if task.classes:
        named = task.classes
        classes = class_embeddings(encode, named.names, named.templates) if encode else named.vectors
    if task.retrieval and encode:
        captions = np.asarray(encode(all_captions(task.reader.index)), np.float32)
        owner = caption_owners(task.reader.index)
    elif task.retrieval:
        assert task.text_key
        captions, owner = load_texts(task.reader.index, task.text_key, task.text_width)
    return Texts(classes, captions, owner)


def kept_file(task: Validation) -> str:
    """The file in a checkpoint that keeps the vectors of its validation: who looks at the results need not embed again.

    Named after what they are of: the set and, where texts are in it, the sentences.
    """
    of = task.reader.index.fingerprint
    if not task.text_key:
        sentences = task.classes and (task.classes.names, task.classes.templates)
        of = hashlib.sha256(json.dumps([of, sentences, task.retrieval]).encode()).hexdigest()
    return f"validation-{of[:16]}.safetensors"


def kept_bytes(task: Validation, result: Result) -> bytes:
    """The vectors as safetensors; those of texts where they are nowhere else."""
    from safetensors.numpy import save

    texts = {} if task.text_key else {k: v for k, v in result.texts._asdict().items() if v is not None}
    return save(result.embedded._asdict() | texts)


def load_kept(checkpoint: str, task: Validation) -> tuple[Embedded, Texts] | None:
    """The vectors of this validation that a checkpoint keeps, or None."""
    from safetensors.numpy import load

    content = content_of(join(checkpoint, kept_file(task)))
    if content is None:
        return None
    found = load(content)
    embedded = Embedded(**{name: found.pop(name) for name in Embedded._fields})
    return embedded, texts_of(task, None) if task.text_key else Texts(**found)


def score(task: Validation, embedded: Embedded, texts: Texts) -> dict[str, float]:
    """The metrics that the task asks for, over the rows that could be decoded."""
    return shares(rank(task.reader.index.root, embedded, texts))


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
