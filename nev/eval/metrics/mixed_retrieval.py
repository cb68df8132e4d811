"""A text query ranks texts and images in one list: what a team sees whose index holds both."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from nev.eval.metrics.neighbours import nearest
from nev.eval.metrics.ranks import Floats, Ints, best_ranks, row_numbers, unit_rows


def mixed_retrieval(
    images: ArrayLike, texts: ArrayLike, owner: ArrayLike, k: int = 10, chunk: int = 1024
) -> dict[str, float]:
    """Search in one list of n images [n, D] and of texts, all unit; owner: int [m], the image that text j describes.

    Queries are the first texts of images that have several, and the list holds all images and all other texts. Where no image
    has several, queries are the texts of every other image.

    mixed/images_in_list: share of images in the list. mixed/images_found: their share among the k best of a query; where
    pictures and texts are one space the two are alike. mixed/own_image: share of queries whose image is among the k best.
    The same after the images' centroid is moved onto the texts' (`..._shifted`), rows made unit again: what closing the gap
    afterwards is worth (Liang et al. 2022). Raises ValueError as `nev.eval.metrics.retrieval` does.
    """
    images, texts = unit_rows("images", images), unit_rows("texts", texts)
    if images.shape[1] != texts.shape[1]:
        raise ValueError(f"images are {images.shape[1]} wide and texts {texts.shape[1]}: use one encoder pair")
    owner = row_numbers("owner", owner, len(texts), len(images), "the images")
    asked = make_queries(owner)
    rest = np.delete(texts, asked, axis=0)
    found = {"mixed/images_in_list": len(images) / (len(images) + len(rest))}
    for name, own in (("", images), ("_shifted", shift_means(images, texts))):
        candidates = np.concatenate([own, rest])
        best = nearest(texts[asked], candidates, k, chunk).rows
        ranks = best_ranks(texts[asked], candidates, np.arange(len(asked)), owner[asked], chunk)
        found[f"mixed/images_found{name}"] = float(np.mean(best < len(images)))
        found[f"mixed/own_image{name}"] = float(np.mean(ranks < k))
    return found


def text_retrieval(texts: ArrayLike, owner: ArrayLike, chunk: int = 1024) -> dict[str, float]:
    """What the text tower alone finds: texts/own_rK, the share of first captions that have another caption of their image among
    the k best of all captions that do not ask. texts: unit [m, D]; owner: int [m], the image that text j describes.

    Nothing where no image has several captions.
    """
    texts = unit_rows("texts", texts)
    owner = np.asarray(owner, np.int64)
    images, first, counts = np.unique(owner, return_index=True, return_counts=True)
    asked, images = first[counts > 1], images[counts > 1]
    if not len(asked):
        return {}
    kept = np.delete(np.arange(len(texts)), asked)
    place = np.searchsorted(images, owner[kept])
    right = np.flatnonzero((place < len(images)) & (images[np.minimum(place, len(images) - 1)] == owner[kept]))
    ranks = best_ranks(texts[asked], texts[kept], place[right], right, chunk)
    return {f"texts/own_r{k}": float(np.mean(ranks < k)) for k in (1, 10)}


def make_queries(owner: Ints) -> Ints:
    """Positions of the texts that ask, int64."""
    _, first, counts = np.unique(owner, return_index=True, return_counts=True)
    return first[counts > 1] if (counts > 1).any() else first[::2]


def shift_means(images: Floats, texts: Floats) -> Floats:
    """Images with the centroid of the texts instead of their own, unit again."""
    moved = images - images.mean(0) + texts.mean(0)
    return np.asarray(moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12), np.float32)
