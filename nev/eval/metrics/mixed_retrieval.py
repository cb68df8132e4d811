"""Search by text in one list of texts and images, as in an index that holds both."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nev.eval.metrics.ranks import Floats, Ints, best_ranks, row_numbers, unit_rows
from nev.ops.vectors import shift_mean

TIED = 1e-9  # scores in float64 closer than this are equal


class Search(NamedTuple):
    """What a query finds in the list, Q queries.

    ranks: int64 [Q], the rank of the query's image, 0 is first.
    found: share of images among the k best of a query.
    above: float64 [Q], share of other images' texts that score less than the query's image.
    """

    ranks: Ints
    found: float
    above: NDArray[np.float64]


def mixed_retrieval(
    images: ArrayLike, texts: ArrayLike, owner: ArrayLike, k: int = 10, tile_scores: int = 2**24
) -> dict[str, float]:
    """Search in one list of images and texts.

    images: unit [n, D]. texts: unit [m, D]. owner: int [m], the image that text j describes.
    Queries are the first texts of images that have several texts; where no image has several, the texts of every other image.
    The list has all images, and all texts that are not queries.
    tile_scores: most scores in memory at once, or those of one query where they are more.
    Returns:
    mixed/images_in_list: share of images in the list.
    mixed/images_found: share of images among the k best of a query; equal to images_in_list in one space.
    mixed/own_image: share of queries whose image is among the k best. mixed/own_image_r100: among the 100 best.
    mixed/own_image_median: median over the queries of their image's rank, 1 is first.
    mixed/auc: P(a query's image scores above a text of another image). 0 where images come behind all texts, whatever they show;
        1 where texts of other images come behind the query's image.
    ..._shifted: the same after the images' centroid was moved onto the centroid of the texts (Liang et al. 2022).
    ..._standardised: the same with a query's scores less their mean, divided by their deviation, over images and over texts.
    Raises ValueError as `nev.eval.metrics.retrieval` does.
    """
    images, texts = unit_rows("images", images), unit_rows("texts", texts)
    if images.shape[1] != texts.shape[1]:
        raise ValueError(f"images are {images.shape[1]} wide and texts {texts.shape[1]}: use one encoder pair")
    owner = row_numbers("owner", owner, len(texts), len(images), "the images")
    queries = choose_queries(owner)
    rest = np.delete(np.arange(len(texts)), queries)
    numbers = {"mixed/images_in_list": len(images) / (len(images) + len(rest))}
    shifted = shift_mean(images, images.mean(0), texts.mean(0))
    for name, pictures, standardise in (
        ("", images, False),
        ("_shifted", shifted, False),
        ("_standardised", images, True),
    ):
        search = _search(pictures, texts, owner, queries, rest, standardise, k, tile_scores)
        numbers |= {
            f"mixed/images_found{name}": search.found,
            f"mixed/own_image{name}": float(np.mean(search.ranks < k)),
            f"mixed/own_image_r100{name}": float(np.mean(search.ranks < 100)),
            f"mixed/own_image_median{name}": float(np.median(search.ranks)) + 1,
            f"mixed/auc{name}": float(np.mean(search.above)),
        }
    return numbers


def _search(
    images: Floats, texts: Floats, owner: Ints, queries: Ints, rest: Ints, standardise: bool, k: int, tile_scores: int
) -> Search:
    """Search by texts[queries] among all images and texts[rest]."""
    sides = [side.astype(np.float64).T for side in (images, texts[rest])]
    ranks, found, above, rows = [], 0, [], max(1, tile_scores // (len(images) + len(rest)))
    for start in range(0, len(queries), rows):
        asking = queries[start : start + rows]
        own = owner[asking]
        image_scores, text_scores = (texts[asking].astype(np.float64) @ side for side in sides)
        if standardise:
            image_scores, text_scores = (_standardise(scores) for scores in (image_scores, text_scores))
        mine = image_scores[np.arange(len(asking)), own, None]
        # A wrong candidate of the same score ranks before the right one (see `nev.eval.metrics.ranks`).
        at_least = (image_scores >= mine - TIED).sum(1) - 1 + (text_scores >= mine - TIED).sum(1)
        ranks.append(at_least)
        scores = np.concatenate([image_scores, text_scores], axis=1)
        best = np.argpartition(-scores, min(k, scores.shape[1]) - 1, axis=1)[:, :k]
        found += int((best < len(images)).sum())
        other = owner[rest] != own[:, None]
        less = (text_scores < mine - TIED) + 0.5 * (np.abs(text_scores - mine) <= TIED)
        above.append((less * other).sum(1) / np.maximum(1, other.sum(1)))
    count = len(queries) * min(k, len(images) + len(rest))
    return Search(np.concatenate(ranks), found / count, np.concatenate(above))


def _standardise(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each row less its mean, divided by its standard deviation. A row of equal scores is 0."""
    deviation = scores.std(axis=1, keepdims=True)
    centred = scores - scores.mean(axis=1, keepdims=True)
    scaled: NDArray[np.float64] = np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > TIED)
    return scaled


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
