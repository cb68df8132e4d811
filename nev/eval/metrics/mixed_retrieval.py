"""Search by text in one list of texts and images, as in an index that holds both."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from nev.eval.metrics.neighbours import nearest
from nev.eval.metrics.ranks import Ints, best_ranks, row_numbers, unit_rows
from nev.ops.vectors import shift_mean


def mixed_retrieval(
    images: ArrayLike, texts: ArrayLike, owner: ArrayLike, k: int = 10, chunk: int = 1024
) -> dict[str, float]:
    """Search in one list of images and texts.

    images: unit [n, D]. texts: unit [m, D]. owner: int [m], the image that text j describes.
    Queries are the first texts of images that have several texts; where no image has several, the texts of every other image.
    The list has all images, and all texts that are not queries.
    Returns:
    mixed/images_in_list: share of images in the list.
    mixed/images_found: share of images among the k best of a query; equal to images_in_list in one space.
    mixed/own_image: share of queries whose image is among the k best.
    ..._shifted: the same after the images' centroid was moved onto the centroid of the texts (Liang et al. 2022).
    Raises ValueError as `nev.eval.metrics.retrieval` does.
    """
    images, texts = unit_rows("images", images), unit_rows("texts", texts)
    if images.shape[1] != texts.shape[1]:
        raise ValueError(f"images are {images.shape[1]} wide and texts {texts.shape[1]}: use one encoder pair")
    owner = row_numbers("owner", owner, len(texts), len(images), "the images")
    queries = choose_queries(owner)
    rest = np.delete(texts, queries, axis=0)
    numbers = {"mixed/images_in_list": len(images) / (len(images) + len(rest))}
    for name, pictures in (("", images), ("_shifted", shift_mean(images, images.mean(0), texts.mean(0)))):
        candidates = np.concatenate([pictures, rest])
        best = nearest(texts[queries], candidates, k, chunk).rows
        ranks = best_ranks(texts[queries], candidates, np.arange(len(queries)), owner[queries], chunk)
        numbers[f"mixed/images_found{name}"] = float(np.mean(best < len(images)))
        numbers[f"mixed/own_image{name}"] = float(np.mean(ranks < k))
    return numbers


def text_retrieval(texts: ArrayLike, owner: ArrayLike, chunk: int = 1024) -> dict[str, float]:
    """Search among the texts alone, by the first text of each image that has several.

    texts: unit [m, D]. owner: int [m], the image that text j describes.
    Returns texts/own_r1, texts/own_r10: share of queries that have another text of their image among the k best of all texts
    that are not queries. Returns nothing where no image has several texts.
    """
    texts = unit_rows("texts", texts)
    owner = np.asarray(owner, np.int64)
    images, first, counts = np.unique(owner, return_index=True, return_counts=True)
    queries, images = first[counts > 1], images[counts > 1]
    if not len(queries):
        return {}
    rest = np.delete(np.arange(len(texts)), queries)
    place = np.searchsorted(images, owner[rest])
    right = np.flatnonzero((place < len(images)) & (images[np.minimum(place, len(images) - 1)] == owner[rest]))
    ranks = best_ranks(texts[queries], texts[rest], place[right], right, chunk)
    return {f"texts/own_r{k}": float(np.mean(ranks < k)) for k in (1, 10)}


def choose_queries(owner: Ints) -> Ints:
    """Positions of the texts that are queries: int64."""
    _, first, counts = np.unique(owner, return_index=True, return_counts=True)
    return first[counts > 1] if (counts > 1).any() else first[::2]
