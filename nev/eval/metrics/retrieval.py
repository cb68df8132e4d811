"""Recall@k of text-to-image and image-to-text retrieval, and chance. Scores are computed in tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nev.eval.metrics.ranks import Ints, best_ranks, row_numbers, unit_rows


class Ranks(NamedTuple):
    """texts: int64 [m], the rank of a text's image. images: int64 [n], the best rank of an image's texts. 0 is first."""

    texts: Ints
    images: Ints


def retrieval(
    images: ArrayLike, texts: ArrayLike, owner: ArrayLike, ks: Sequence[int] = (1, 5, 10), chunk: int = 1024
) -> dict[str, float]:
    """Recall@k both ways between n images and m texts.

    images: unit [n, D]. texts: unit [m, D]. owner: int [m], the row of the image that text j describes; an image may
    have several texts, and has at least one. Scores are cosines in float32, in tiles of at most chunk x chunk.

    text_to_image: the share of texts whose image is among the k best of all n images. image_to_text: the share of
    images for which *any* of their texts is among the k best of all m (the convention of Karpathy & Fei-Fei 2015 and of
    the Flickr and COCO tables since). Of tied candidates the right ones come last (see `nev.eval.metrics.ranks`).

    Returns `retrieval/text_to_image/r{k}`, `retrieval/image_to_text/r{k}`, and `.../r{k}_chance`: what a random order
    scores. All in [0, 1]. Raises ValueError for an owner outside 0..n-1, an image without a text, and embeddings that
    are not finite or not of unit length.
    """
    return recalls(retrieval_ranks(images, texts, owner, chunk), np.asarray(owner), ks)


def recalls(ranks: Ranks, owner: Ints, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """What `retrieval` returns, from the ranks of the right answers."""
    captions = np.bincount(owner)
    shares: dict[str, float] = {}
    for k in ks:
        shares[f"retrieval/text_to_image/r{k}"] = float(np.mean(ranks.texts < k))
        shares[f"retrieval/text_to_image/r{k}_chance"] = min(k / len(captions), 1.0)
        shares[f"retrieval/image_to_text/r{k}"] = float(np.mean(ranks.images < k))
        shares[f"retrieval/image_to_text/r{k}_chance"] = _any_of(captions, len(ranks.texts), k)
    return shares


def retrieval_ranks(images: ArrayLike, texts: ArrayLike, owner: ArrayLike, chunk: int = 1024) -> Ranks:
    """The ranks of the right answers. Arguments and errors are those of `retrieval`."""
    images, texts = unit_rows("images", images), unit_rows("texts", texts)
    if images.shape[1] != texts.shape[1]:
        raise ValueError(f"images are {images.shape[1]} wide and texts {texts.shape[1]}: use one encoder pair")
    owner = row_numbers("owner", owner, len(texts), len(images), "the images")
    captions = np.bincount(owner, minlength=len(images))
    if not captions.all():
        bare = np.flatnonzero(captions == 0)
        raise ValueError(
            f"{len(bare)} of {len(images)} images have no text, the first is row {bare[0]}: leave them out"
        )
    numbers = np.arange(len(texts))
    return Ranks(best_ranks(texts, images, numbers, owner, chunk), best_ranks(images, texts, owner, numbers, chunk))


def _any_of(captions: Ints, texts: int, k: int) -> float:
    """Mean chance that k of m texts, drawn without replacement, hold one of an image's g texts: 1 - C(m-g, k) / C(m, k)."""
    drawn = np.arange(min(k, texts))
    counts, images = np.unique(captions, return_counts=True)
    missed = np.clip((texts - counts[:, None] - drawn) / (texts - drawn), 0, None).prod(axis=1)
    return float(np.average(1 - missed, weights=images))
