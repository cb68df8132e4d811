"""Are images and texts in one space? Gap, spread, hubs and neighbourhoods of their vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import skew
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import StratifiedKFold, cross_val_score

from nev.eval.metrics.neighbours import mutual_knn, nearest
from nev.eval.metrics.ranks import Floats, mean_cosine, row_numbers, unit_rows

FOLDS = 5
UNIFORMITY_T = 2.0


def geometry(
    images: ArrayLike, texts: ArrayLike, owner: ArrayLike, k: int = 10, chunk: int = 4096, seed: int = 0
) -> dict[str, float]:
    """The geometry of n images and m texts.

    images: unit [n, D]. texts: unit [m, D]. owner: int [m], the image that text j describes.
    Returns:
    space/gap: distance of the centroids (Liang et al. 2022); 0 in one space.
    space/relative_gap: gap over the root mean square distance of a vector from its centroid; 0 in one space.
    space/separable: balanced accuracy, on held-out vectors, of a linear classifier of the modality (ridge, 5 folds drawn by
    `seed`); 0.5 in one space.
    space/alignment: mean squared distance of a text and its image (Wang & Isola 2020).
    space/uniformity_images, _texts: log of the mean of exp(-2 d^2) over pairs of different rows; lower is more even (same paper).
    space/anisotropy_images, _texts: mean cosine of different rows; 0 where all directions are used evenly.
    space/hubness: skewness of how often an image is among the k nearest of a text (Radovanovic et al. 2010).
    space/overlap: share of an image's k nearest images whose first texts are among the k nearest of the image's first text
    (mutual k-nearest neighbours, Huh et al. 2024); absent where no more than k images have a text.
    Memory is O(chunk^2 + (n + m) k) beside the embeddings. Raises ValueError as `nev.eval.metrics.retrieval` does, and for
    fewer than 5 images or texts.
    """
    images, texts = unit_rows("images", images), unit_rows("texts", texts)
    if images.shape[1] != texts.shape[1]:
        raise ValueError(f"images are {images.shape[1]} wide and texts {texts.shape[1]}: use one encoder pair")
    if min(len(images), len(texts)) < FOLDS:
        raise ValueError(f"at least {FOLDS} images and texts are needed, not {len(images)} and {len(texts)}")
    owner = row_numbers("owner", owner, len(texts), len(images), "the images")
    numbers = {
        "space/gap": centroid_distance(images, texts),
        "space/relative_gap": centroid_distance(images, texts) / np.sqrt((spread(images) + spread(texts)) / 2),
        "space/separable": separable(images, texts, seed),
        "space/alignment": float(np.mean(2 - 2 * np.einsum("td,td->t", images[owner], texts, dtype=np.float64))),
        "space/uniformity_images": uniformity(images, chunk),
        "space/uniformity_texts": uniformity(texts, chunk),
        "space/anisotropy_images": mean_cosine(images),
        "space/anisotropy_texts": mean_cosine(texts),
        "space/hubness": hubness(texts, images, k, chunk),
    }
    described, first = np.unique(owner, return_index=True)
    if len(described) > k:
        numbers["space/overlap"] = mutual_knn(images[described], texts[first], k, chunk)
    return {name: float(value) for name, value in numbers.items()}


def centroid_distance(left: Floats, right: Floats) -> float:
    """Distance of the means of two sets of rows."""
    return float(np.linalg.norm(left.mean(0, dtype=np.float64) - right.mean(0, dtype=np.float64)))


def spread(rows: Floats) -> float:
    """Mean squared distance of unit rows from their mean: 1 - |mean|^2."""
    return float(1 - (rows.mean(0, dtype=np.float64) ** 2).sum())


def separable(images: Floats, texts: Floats, seed: int) -> float:
    """Balanced accuracy, on held-out rows, of a linear classifier that separates images from texts."""
    rows = np.concatenate([images, texts])
    which = np.repeat([0, 1], [len(images), len(texts)])
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    classifier = RidgeClassifier(class_weight="balanced")
    return float(cross_val_score(classifier, rows, which, cv=folds, scoring="balanced_accuracy").mean())


def uniformity(rows: Floats, chunk: int) -> float:
    """log of the mean of exp(-2 d^2) over ordered pairs of different rows."""
    total = 0.0
    for top in range(0, len(rows), chunk):
        for left in range(0, len(rows), chunk):
            cosines = rows[top : top + chunk] @ rows[left : left + chunk].T
            if top == left:
                np.fill_diagonal(cosines, -np.inf)
            total += float(np.exp(2 * UNIFORMITY_T * (cosines - 1)).sum(dtype=np.float64))
    return float(np.log(total / (len(rows) * (len(rows) - 1))))


def hubness(queries: Floats, candidates: Floats, k: int, chunk: int) -> float:
    """Skewness of how often a candidate is among the k nearest of a query; 0 where all candidates are equally often."""
    rows = nearest(queries, candidates, k, chunk).rows
    counts = np.bincount(rows.ravel(), minlength=len(candidates))
    return 0.0 if counts.min() == counts.max() else float(skew(counts))
